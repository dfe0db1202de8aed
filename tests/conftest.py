"""Settings that every test shares."""

from hypothesis import HealthCheck, settings

# A busy machine is not a failing test: no deadline for an example, and no complaint about a slow start.
settings.register_profile(
    "duologue", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("duologue")
