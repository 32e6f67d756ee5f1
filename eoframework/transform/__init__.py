"""Kafka to Kafka, in one Kafka transaction with the group's offsets."""
