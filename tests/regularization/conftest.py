"""The fixture ``ranks`` of the distributed tests."""

from tests.distributed.conftest import ranks

__all__ = ["ranks"]
