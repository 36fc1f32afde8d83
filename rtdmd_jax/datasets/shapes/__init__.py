"""Captioned 64x64 images of coloured shapes, described in GenEval's prompt grammar."""
