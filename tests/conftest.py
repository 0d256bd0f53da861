"""What tests of every folder may use."""

pytest_plugins = ["tests.support.kafka", "tests.support.vault", "tests.support.postgres"]
