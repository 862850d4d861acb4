"""Time: of attention, of decode, of whole servers; and the report of it."""
