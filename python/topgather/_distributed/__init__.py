"""What :mod:`topgather.distributed` is made of, but for tables."""
