"""The wall to PostgreSQL: the only place that knows SQLAlchemy and psycopg."""
