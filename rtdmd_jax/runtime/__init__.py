"""The ground of any long run on several devices; it knows nothing of RTDMD."""
