"""Recordings that replay bit by bit.

`recorder` takes frames, belt and decisions from the line; `segment_writer` writes them within a quota; `segments` is
the file format; `replay` is a recording as camera and encoder; `comparison` judges it again and reports differences.
"""
