"""Instruments and methods that nothing serves; only a checkout has them, no wheel."""
