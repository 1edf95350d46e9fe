"""What a change to a network did to the dense margins: functions of arrays, no disk."""
