"""The commands that tests start meet signals as a terminal's do, also where the tests run under nohup or behind `&`."""

import signal

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        # Goes on doing nothing here, while a command that is started from here has the default again.
        signal.signal(number, lambda *_: None)
