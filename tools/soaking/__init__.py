"""What `tools/soak` is made of: writers with an oracle, faults, readers that compare, and what the processes take meanwhile.

writer (one for each disk) -> target; oracle knows each write with its times
faults -> processes and store; looks -> points, compared with the oracle; trend: memory, files, room
"""
