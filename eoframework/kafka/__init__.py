"""The wall to Kafka: the only place that knows confluent_kafka and librdkafka."""
