"""Keeps a run in an object store while its processes work on folders of their nodes; what a checkpoint is, is not here.

A store can neither rename nor append, and a listing of it may be out of date. So a checkpoint counts once its manifest
is there, an index names those that may be, and listings are asked for logs alone.
"""
