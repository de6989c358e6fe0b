"""Checkpoints on a model hub, read by byte ranges over HTTP and never stored as a whole.

`repository` says what SRC means and what a repository holds at one commit, `client` how a range is fetched, `pieces`
which ranges are here and where they lie, `reading` who fetches them for whom. Nothing here knows what a tensor is.
"""
