"""How long a test waits for what must come."""

#: Seconds. It ends a test whose event never comes, and is never the test: a busy machine may take
#: its time. What must happen *within* a time is asserted by the fixture `within`.
PATIENCE_S = 60.0
#: The same for a process that may load jax, compile, and start others that do so.
PROCESS_S = 300.0
