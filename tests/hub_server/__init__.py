"""A small server of the Hub's protocol, for tests and `make hub-demo`; see the README beside this file."""

from .server import CUT, HANG, Fault, HubServer


__all__ = ["CUT", "HANG", "Fault", "HubServer"]
