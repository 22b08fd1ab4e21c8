"""Attacks that a defense must withstand; each takes its harmful source from the user."""

from hftlight.attacks.harmful_mix import harmful_mix

__all__ = ["harmful_mix"]
