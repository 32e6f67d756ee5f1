"""From Kafka to the database: `executor` is one message's life, `worker` one thread's."""
