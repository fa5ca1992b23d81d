"""The plan of what goes: its laws, for histories of every kind."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cdpserver.retention import plan as plans
from cdpserver.retention.plan import Decision, Facts, Hold, Interval, Node, drops, kept_bytes, plan, plan_all
from cdpserver.retention.policy import DAY_NS, Policy
from cdpserver.retention.slots import Rule, slot_of
from cdpserver.retention.steps import Step

MINUTE_NS = 60 * 1_000_000_000
BEGAN_NS = 20_000 * DAY_NS

RULES = st.lists(
    st.builds(Rule, st.integers(1, 9), st.sampled_from("hdwmy")), max_size=3, unique_by=lambda r: r.unit
)
POLICIES = st.builds(
    Policy,
    bp_every_ns=st.just(20 * MINUTE_NS),
    keep_rp=st.integers(20, 6000).map(lambda minutes: (Step(minutes * MINUTE_NS),)),
    keep_bp=RULES.map(tuple),
    size_cap=st.none() | st.integers(0, 3000),
    at_cap=st.sampled_from(["shorten", "refuse"]),
)


@st.composite
def histories(draw: st.DrawFn, disk: str = "d") -> Facts:
    """A history as passes before may have left it: islands, each on a node; nodes anywhere; a tail after the newest node."""
    count = draw(st.integers(1, 10))
    steps = draw(st.lists(st.integers(1, 4000), min_size=count, max_size=count))
    closed = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    present = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    intervals: list[Interval] = []
    nodes: list[Node] = []
    time_ns, seq = BEGAN_NS, 0
    for number, (minutes, has_node, here) in enumerate(zip(steps, closed, present, strict=True), start=1):
        first_seq, first_ns = seq + 1, time_ns
        seq, time_ns = seq + draw(st.integers(2, 5)), time_ns + minutes * MINUTE_NS
        below = number == 1 or (intervals and intervals[-1].number == number - 1)
        stands = below or (nodes and nodes[-1].interval == number - 1)
        refers = frozenset(i.number for i in intervals if draw(st.integers(0, 9)) == 0)
        # Nothing drops an interval after the newest node, and none that the next one is read from.
        after_newest = not nodes or nodes[-1].interval < number - 1
        if stands and (here or number == count or after_newest):
            size = draw(st.integers(1, 500))
            intervals.append(Interval(number, first_seq, seq, first_ns, time_ns, size, refers))
        if has_node and number < count:
            nodes.append(
                Node(number, seq, time_ns, number, draw(st.integers(0, 2)), draw(st.integers(1, 300)))
            )
    if not intervals or intervals[-1].number != count:
        size = draw(st.integers(1, 500))
        nodes = [n for n in nodes if n.interval != count - 1]
        nodes.append(Node(count - 1, first_seq - 1, first_ns, count - 1, 1, size))
        intervals.append(Interval(count, first_seq, seq, first_ns, time_ns, size))
    seqs = [s for i in intervals for s in range(i.first_seq, i.last_seq + 1)] + [n.seq for n in nodes]
    holds = draw(st.lists(st.builds(Hold, st.sampled_from(seqs), st.just("locked")), max_size=3))
    stood = draw(st.lists(st.sampled_from([n.number for n in nodes]), max_size=2)) if nodes else []
    now_ns = time_ns + draw(st.integers(-3000, 90_000)) * MINUTE_NS
    return Facts(
        disk,
        draw(POLICIES),
        now_ns,
        tuple(intervals),
        tuple(nodes),
        tuple(holds),
        dict.fromkeys(stood, "a fork"),
    )


def after(facts: Facts, gone: list[Decision]) -> Facts:
    """The facts once these things are gone."""
    names = {decision.what for decision in gone}
    return replace(
        facts,
        intervals=tuple(i for i in facts.intervals if f"interval:{i.number}" not in names),
        nodes=tuple(n for n in facts.nodes if f"bp:{n.number}" not in names),
    )


def readable(facts: Facts, seq: int) -> bool:
    """The rule of views, written down once more: down the intervals, then the node that closed the first missing one."""
    if any(node.seq == seq for node in facts.nodes):
        return True
    place = next((i.number for i in facts.intervals if i.first_seq <= seq <= i.last_seq), None)
    return place is not None and read_through(facts, place)


def read_through(facts: Facts, place: int) -> bool:
    held = {i.number: i for i in facts.intervals}
    while place in held:
        if not all(older in held and read_through(facts, older) for older in held[place].refers):
            return False
        place -= 1
    return place == 0 or any(node.interval == place for node in facts.nodes)


def wanted_seqs(facts: Facts) -> set[int]:
    """What must be readable, from the words of the policy alone."""
    policy, found = facts.policy, {hold.seq for hold in facts.holds}
    newest = facts.nodes[-1] if facts.nodes else None
    for i in facts.intervals:
        if newest is None or i.number > newest.interval or i.last_time_ns >= facts.now_ns - policy.keep_rp_ns:
            found |= set(range(i.first_seq, i.last_seq + 1))
    for rule in policy.keep_bp:
        slots = {slot_of(rule.unit, n.time_ns) for n in facts.nodes if rule.covers(n.time_ns, facts.now_ns)}
        for slot in slots:
            inside = [n for n in facts.nodes if slot_of(rule.unit, n.time_ns) == slot]
            found.add(max(inside, key=lambda n: (n.grade, n.number)).seq)
    if newest is not None:
        found.add(newest.seq)
    return found | {n.seq for n in facts.nodes if n.number in facts.stood_on}


HISTORIES = histories()


@settings(max_examples=200)
@given(HISTORIES)
def test_what_is_wanted_stays_readable_after_every_step(facts: Facts) -> None:
    before = {seq for seq in wanted_seqs(facts) if readable(facts, seq)}
    gone = drops(plan(facts))
    for count in range(len(gone) + 1):
        left = after(facts, gone[:count])
        assert all(readable(left, seq) for seq in before), gone[:count]
        # Nor does anything that is still there become unreadable before it goes.
        for interval in left.intervals:
            if readable(facts, interval.last_seq):
                assert readable(left, interval.last_seq)


@given(HISTORIES)
def test_one_pass_is_enough(facts: Facts) -> None:
    gone = drops(plan(facts))
    assert drops(plan(after(facts, gone))) == []


@given(HISTORIES)
def test_a_killed_pass_is_finished_by_the_next(facts: Facts) -> None:
    gone = drops(plan(facts))
    for count in range(len(gone)):
        left = after(facts, gone[:count])
        assert {d.what for d in drops(plan(left))} == {d.what for d in gone[count:]}


@given(HISTORIES)
def test_what_goes_is_needed_by_nothing_that_stays(facts: Facts) -> None:
    """Nothing that nobody wants is kept: each kept thing is wanted itself, or removing it would break one that is."""
    wanted = {seq for seq in wanted_seqs(facts) if readable(facts, seq)}
    left = after(facts, drops(plan(facts)))
    young_ns = facts.now_ns - facts.policy.keep_rp_ns
    for interval in left.intervals:
        without = replace(left, intervals=tuple(i for i in left.intervals if i != interval))
        inside = set(range(interval.first_seq, interval.last_seq + 1))
        referred = any(interval.number in other.refers for other in left.intervals)
        assert inside & wanted or referred or not all(readable(without, seq) for seq in wanted)
    held = {interval.number for interval in left.intervals}
    for node in left.nodes:
        # A base point under an interval is kept even where the older interval is, too: it is a point, and short to read.
        assert node.seq in wanted or node.time_ns >= young_ns or node.interval + 1 in held


@given(HISTORIES, st.integers(0, 100_000))
def test_a_clock_set_back_never_drops_more(facts: Facts, minutes: int) -> None:
    earlier = replace(facts, now_ns=facts.now_ns - minutes * MINUTE_NS)
    assert {d.what for d in drops(plan(earlier))} <= {d.what for d in drops(plan(facts))}


@given(HISTORIES, st.integers(0, 5))
def test_more_holds_never_drop_more(facts: Facts, number: int) -> None:
    without = replace(facts, holds=facts.holds[:number])
    assert {d.what for d in drops(plan(facts))} <= {d.what for d in drops(plan(without))}


@given(HISTORIES)
def test_every_thing_has_one_decision_with_a_reason(facts: Facts) -> None:
    found = plan(facts)
    names = [f"interval:{i.number}" for i in facts.intervals] + [f"bp:{n.number}" for n in facts.nodes]
    assert [d.what for d in found] == names
    assert all(d.reason and d.disk == "d" for d in found)


@given(HISTORIES, histories("e"), st.none() | st.integers(0, 6000))
def test_caps(first: Facts, second: Facts, store_cap: int | None) -> None:
    decisions = plan_all([first, second], store_cap)
    kept = {
        facts.disk: sum(d.bytes for d in decisions if d.keep and d.disk == facts.disk)
        for facts in (first, second)
    }
    for facts in (first, second):
        policy, least = facts.policy, plans.fixed_bytes(facts)
        assert least <= kept[facts.disk] <= kept_bytes(facts)
        if policy.at_cap == "refuse":
            assert kept[facts.disk] == kept_bytes(facts)
        elif policy.size_cap is not None:
            assert kept[facts.disk] <= max(policy.size_cap, least)
        # What holds and the newest base point need is there, whatever the cap.
        gone = [d for d in drops(decisions) if d.disk == facts.disk]
        held = {h.seq for h in facts.holds if readable(facts, h.seq)}
        assert all(readable(after(facts, gone), seq) for seq in held)
        assert drops(plan_all([after(facts, gone)])) == []
    short = [facts for facts in (first, second) if facts.policy.at_cap == "shorten"]
    if store_cap is not None and len(short) == 2:
        assert sum(kept.values()) <= max(store_cap, plans.fixed_bytes(first) + plans.fixed_bytes(second))


def busy_day(keep_bp: tuple[Rule, ...] = (Rule(48, "h"), Rule(7, "d"))) -> Facts:
    """Ten days of base points every 20 minutes, every interval still there."""
    intervals, nodes = [], []
    for number in range(1, 721):
        end_ns = BEGAN_NS + number * 20 * MINUTE_NS - 1
        intervals.append(Interval(number, number * 10, number * 10 + 9, end_ns - 20 * MINUTE_NS, end_ns, 100))
        nodes.append(Node(number - 1, number * 10 + 9, end_ns, number, 1, 10))
    last = Interval(721, 7210, 7215, intervals[-1].last_time_ns, intervals[-1].last_time_ns + 5, 1)
    policy = Policy(keep_bp=keep_bp)
    return Facts("d", policy, intervals[-1].last_time_ns + MINUTE_NS, (*intervals, last), tuple(nodes))


def test_ten_days_at_a_usual_policy() -> None:
    kept = [d for d in plan(busy_day()) if d.keep]
    intervals = [d.number for d in kept if d.is_interval]
    assert intervals == list(range(721 - 72, 722))
    nodes = [d for d in kept if not d.is_interval]
    # All of the last day, one an hour of the day before, one a day of the week where no hour's is.
    assert len(nodes) == 72 + 24 + 5
    reasons = {d.number: d.reason for d in kept if not d.is_interval}
    assert reasons[719] == "the newest base point: the next one is computed from it"
    assert reasons[718] == "keep_rp: of the last 1d"
    assert any(reason == "keep_bp 7d: that of its day" for reason in reasons.values())


def test_the_best_grade_of_a_slot_is_kept_then_the_newest() -> None:
    facts = busy_day((Rule(9, "d"),))
    day = [
        node.number
        for node in facts.nodes
        if slot_of("d", node.time_ns) == slot_of("d", BEGAN_NS + 3 * DAY_NS)
    ]
    better = day[5]
    nodes = tuple(replace(n, grade=2) if n.number == better else n for n in facts.nodes)
    for found, expected in ((facts, day[-1]), (replace(facts, nodes=nodes), better)):
        assert [d.number for d in plan(found) if d.keep and not d.is_interval and d.number in day] == [
            expected
        ]


def test_a_lock_keeps_its_interval_and_the_base_point_below() -> None:
    facts = busy_day(())
    seq = facts.intervals[99].first_seq + 3
    kept = {d.what: d.reason for d in plan(replace(facts, holds=(Hold(seq, "locked: lock-1"),))) if d.keep}
    assert kept["interval:100"] == "locked: lock-1"
    assert kept["bp:98"] == "interval 100 stands on it"
    assert "interval:99" not in kept and "bp:99" not in kept
    only = {d.what for d in plan(replace(facts, holds=(Hold(facts.nodes[99].seq, "x"),))) if d.keep}
    assert "bp:99" in only and "interval:100" not in only
    assert plans.locked_bytes(replace(facts, holds=(Hold(seq, "x", locked=True),))) == 110
    assert plans.locked_bytes(replace(facts, holds=(Hold(seq, "a fork"),))) == 0


def test_a_cap_takes_the_oldest_first() -> None:
    facts = busy_day(())
    facts = replace(facts, policy=replace(facts.policy, size_cap=5 * 110 + 1))
    kept = [d for d in plan_all([facts]) if d.keep and d.is_interval]
    assert [d.number for d in kept] == [717, 718, 719, 720, 721]
    gone = {d.what: d.reason for d in drops(plan_all([facts]))}
    assert gone["interval:716"] == "the cap is reached: history is shortened"
    assert gone["interval:1"].startswith("older than the policy keeps")
