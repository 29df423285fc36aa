"""What the tests' molecules have in common."""

PHYSICS = {"force_field": ("amber14-all.xml", "implicit/obc1.xml"), "cutoff_nm": 2.0}
