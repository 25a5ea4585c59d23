"""What runs inside a Ray job: supervisor, driver, Ray Train's policies and the workers; never on the user's machine."""
