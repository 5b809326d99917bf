"""The engine at work: hosts, their threads, aggregation and the coordinator."""
