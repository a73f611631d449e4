"""The pair of processes of the distributed tests, for these tests as well."""

from tests.distributed.conftest import ranks

__all__ = ["ranks"]
