"""What Stillhouse costs beside what one would write or take otherwise: `python -m benchmarks`, `make bench`.

Every result is {"name", "unit", "note", "arms": {arm: [one number a repeat]}}; the arms of a result alternate, so what
else the machine does hits all of them. Units that end in "/s" are better when higher, all others when lower.
"""
