"""What asks a job to save and stop. Terminals, srun and systemd send it to all of its processes."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
