"""Checkpoints on a model hub, read by byte ranges over HTTP and never stored as a whole.

`names` says what SRC means, `repository` what a repository holds at one commit, `client` how a range is fetched,
`pieces` and `arena` which ranges are here, `downloads` who fetches them. Nothing here knows what a tensor is.
"""
