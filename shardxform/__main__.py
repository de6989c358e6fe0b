"""`python -m shardxform`."""

from shardxform.cli import main

main()
