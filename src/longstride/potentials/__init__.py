"""Energy functions behind one protocol: AMBER, teachers, distilled students."""
