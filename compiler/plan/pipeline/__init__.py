"""Planning of pipelines: partition into stages, schedules in closed form and by synthesis, simulation, pictures."""
