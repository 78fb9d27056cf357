"""How long a test waits for another process: a guard against one that hangs, no measure.

Beside other work a command takes many times as long as alone.
"""

PATIENCE = 900.0  # seconds
