"""The one rule table: what an op does when an axis cuts its inputs."""
