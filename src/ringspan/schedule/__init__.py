"""Schedules are data: typed actions, their proof, their traffic and their drawing. No torch here."""

from ringspan.schedule.actions import (
    KINDS,
    RESULTS,
    Action,
    Attend,
    Combine,
    Piece,
    Receive,
    Schedule,
    ScheduleBuilder,
    Send,
    parse_schedule,
)
from ringspan.schedule.lifetime import lifetimes
from ringspan.schedule.traffic import PieceBytes, send_bytes, sent_bytes, traffic
from ringspan.schedule.validate import Report, validate

__all__ = [
    "KINDS",
    "RESULTS",
    "Action",
    "Attend",
    "Combine",
    "Piece",
    "PieceBytes",
    "Receive",
    "Report",
    "Schedule",
    "ScheduleBuilder",
    "Send",
    "lifetimes",
    "parse_schedule",
    "send_bytes",
    "sent_bytes",
    "traffic",
    "validate",
]
