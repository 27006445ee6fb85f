"""A profile of a box, as people write one."""

GOOD = """
box:
  name: A box
  cpu: some
  backend: CPU
  pools:
    - {name: ram, total: 16GiB, usable: 15GiB, reserve: 1GiB, why: so, bandwidth: 17GB/s}
  verified: false
  source: "me #1"
  date: "2026"
"""
