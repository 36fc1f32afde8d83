"""What any long run on several devices needs; knows nothing of RTDMD."""
