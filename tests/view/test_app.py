"""The live screen, driven by keys: its pages, its table, and what a feed has to say."""

from __future__ import annotations

from dataclasses import replace

from kit import samples
from kit.feeds import FixedFeed
from kit.loads import snapshots
from kit.running.screen import Advice, appears, drive, shown
from textual.pilot import Pilot

from ctrace.live.protocol import Phase
from ctrace.model.snapshot import Histogram
from ctrace.view.palette import DARK
from ctrace.view.screen.advice import AdvicePane
from ctrace.view.screen.app import TopApp
from ctrace.view.screen.detail import detail_lines


def test_before_the_first_snapshot_it_says_what_it_waits_for() -> None:
    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        lines = shown(app).splitlines()
        assert any("attaching to the kernel: netfilter hooks" in line for line in lines[:-1])
        assert "q quit" in lines[-1]

    drive(look, FixedFeed([], "attaching"))


def test_a_feed_that_cannot_start_closes_the_screen() -> None:
    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.pause(0.3)

    app = drive(look, FixedFeed([], "failed"))
    assert not app.is_running


def test_a_feed_that_fails_later_leaves_its_last_numbers_and_says_why() -> None:
    feed = FixedFeed([samples.incident()])

    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        feed.phase = Phase("failed", "the hooks were detached by somebody else")
        await pilot.pause(0.3)
        text = shown(app)
        for wanted in ("the hooks were detached by somebody else", "ENDED", "CULPRITS", "tcp/8063"):
            assert wanted in text, wanted
        assert "cannot start" not in text

    drive(look, feed)


def test_a_long_message_is_shown_whole() -> None:
    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        app.say("nothing was changed: " + "the rules refuse it, " * 6 + "that is all")
        last = " ".join(" ".join(line.plain for line in app.painted.lines[-4:]).split())
        assert f"nothing was changed: {'the rules refuse it, ' * 6}that is all" in last

    drive(look, size=(80, 24))


def test_enter_drills_down_and_backspace_comes_back() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "enter")
        text = shown(app)
        assert "127.0.0.1 → tcp/10248" in text
        assert "kubelet" in text
        await pilot.press("backspace")
        assert app.state.mode == "top"
        await pilot.press("home", "enter")
        text = shown(app)
        for wanted in ("php-fpm[18211]", "LIFE", "IN TABLE", "none seen", "TIME_WAIT", "63518"):
            assert wanted in text, wanted
        await pilot.press("escape")
        assert "CULPRITS" in shown(app)

    drive(keys, size=(120, 50))


def test_a_long_histogram_is_told_in_few_rows() -> None:
    counts = [0] * 90
    counts[3], counts[40], counts[80] = 700, 20, 3
    edges = tuple(0.001 * 1.12**step for step in range(91))
    incident = samples.incident()
    first = replace(incident.culprits[0], life_histogram=Histogram(edges, tuple(counts)))
    lines = [one.plain for one in detail_lines(incident, first, 80, DARK)]
    start = next(index for index, text in enumerate(lines) if text.startswith(" LIFE"))
    rows = lines[start + 1 : lines.index(" " * 80, start)]
    assert len(rows) <= 12
    numbers = [int(text.split("s ")[-1].split()[0]) for text in rows]
    assert sum(numbers) == 723
    assert numbers[0] == 700
    assert numbers[-1] == 3


def test_the_page_about_one_culprit_tells_everything() -> None:
    """Histograms, ends, states, owner, NAT, samples, peers, curves, advice with its rules."""
    scenes = [samples.incident()]
    first, second, *rest = scenes[0].culprits
    second = replace(second, key="10.42.3.18 -> tcp/8063", proto="tcp", port=8063, src="10.42.3.18")
    scenes[0] = replace(scenes[0], culprits=(first, second, *rest))
    for tick in range(1, 6):
        rates = replace(scenes[0].culprits[0], new_per_s=455.0 + 40 * tick)
        moment = replace(scenes[0], ts=scenes[0].ts + tick * 10**9)
        scenes.append(replace(moment, culprits=(rates, *scenes[0].culprits[1:])))
    feed = FixedFeed(scenes)

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        for at in range(6):
            feed.at = at
            app.look()
        await pilot.press("enter")
        while "reading the rules" in shown(app):
            await pilot.pause(0.1)
        text = shown(app)
        for wanted in (
            "first seen", "455", "up to 655/s", "1 min", "php-fpm[18211]", "opened these flows",
            "docker:shop-php-7c9", "php-fpm: pool www --nodaemonize", "none seen on",
            "pinned (ASSURED)", "expired", "TIME_WAIT", "first to last packet",
            "from insert to destroy", "SAMPLES", "PEERS", "10.42.3.18 → tcp/8063", "10.42.3.17:",
            "ADVICE",
            "safe-with-rules", "inet filter input accepts its answers",
            "tcp dport @client_tcp notrack", "keep-alive",
        ):  # fmt: skip
            assert wanted in text, wanted
        await pilot.press("y")
        assert app.clipboard == samples.remedy().rules
        await pilot.press("escape", "down", "down", "enter")
        assert "none: it holds too little of the table to need a rule" in shown(app)
        await pilot.press("y")
        assert app.clipboard == app.state.subject[0]

    drive(keys, feed, size=(140, 90), advice=AdvicePane(Advice()))


def test_the_order_is_turned_round_over_all_rows() -> None:
    first = snapshots.churning(20, 0)
    whole = snapshots.churning(40, 0)
    feed = FixedFeed([first, replace(first, sort="-held", culprits=whole.culprits[:-21:-1])])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("S")
        assert feed.views[-1][1] == "-held"
        feed.at = 1  # what a feed answers: the other end of all there is
        app.look()
        rows = [spot for spot in app.painted.spots if spot.value == "culprits:0"]
        assert whole.culprits[-1].key.split(" ")[0] in app.painted.lines[rows[0].y].plain
        await pilot.press("S")
        assert feed.views[-1][1] == "held"

    drive(keys, feed)


def test_what_a_feed_has_to_say_is_shown() -> None:
    feed = FixedFeed([samples.calm()])

    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        feed.phase = Phase("live", "recording stopped: no space left on device")
        await appears(app, pilot, "recording stopped: no space left on device")

    drive(look, feed)


def test_the_cursor_stays_with_its_row_when_rows_move() -> None:
    first = snapshots.churning(20, 0)
    turned = snapshots.churning(20, 0)
    turned = type(turned)(**{**turned.__dict__, "culprits": turned.culprits[::-1]})
    feed = FixedFeed([first, turned])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "down")
        feed.at = 1
        await pilot.pause(0.3)
        assert app.state.cursor == 16
        await pilot.press("enter")
        assert app.state.subject[0] == first.culprits[3].key

    drive(keys, feed)


def test_group_and_sort_are_asked_of_the_feed() -> None:
    feed = FixedFeed([samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("g", "G", "s", "2", "less_than_sign", "5", "5", "S")
        assert app.state.sort == "drops"
        assert not app.state.reverse

    drive(keys, feed)
    assert [view[0] for view in feed.views[:2]] == ["process", "pair"]
    assert [view[1] for view in feed.views[2:]] == [
        "new", "-new", "held", "drops", "-drops", "drops",
    ]  # fmt: skip


def test_a_filter_is_typed_and_taken_away() -> None:
    feed = FixedFeed([samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"dport=53", "enter")
        text = shown(app)
        assert "10.42.3.17 → udp/53" in text
        assert "udp/8125" not in text.split("CULPRITS")[1].split("NAMESPACES")[0]
        assert "filter dport=53" in text
        await pilot.press("slash", *"netns=nowhere", "enter")  # another word, and no such place
        assert "no namespace 'nowhere' was seen: n lists them" in shown(app)
        assert app.state.filter == "dport=53"
        await pilot.press("slash", "ctrl+u", *"bogus=1", "enter")
        assert "unknown filter" in shown(app)
        await pilot.press("slash", "escape", "ctrl+l")
        assert "tcp/10248" in shown(app)

    drive(keys, feed)
    assert feed.views[0][2] == "dport=53"
    assert feed.views[-1][2] == ""


def test_a_paused_screen_stands_still() -> None:
    feed = FixedFeed([samples.calm(), samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("space")
        feed.at = 1
        await appears(app, pilot, "PAUSED")
        assert "FULL" not in shown(app)
        await pilot.press("space")
        await appears(app, pilot, "FULL")

    drive(keys, feed)


def test_no_more_rows_are_asked_for_than_the_screen_can_show() -> None:
    many = snapshots.churning(200, 0)
    feed = FixedFeed([replace(many, culprits=many.culprits[:20]), many])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        assert 20 <= feed.rows <= 40
        await pilot.press("space", "end")  # a screen that stands still is scrolled as any other
        assert feed.rows > 200
        feed.at = 1
        await appears(app, pilot, many.culprits[-1].key.split()[0])
        assert app.state.cursor == 199
        feed.snapshots.append(samples.incident())  # nothing that was asked for
        feed.at = 2
        await pilot.pause(0.3)
        assert app.snapshot is many

    drive(keys, feed, size=(120, 40))


def test_namespaces_victims_and_panes() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("n")
        assert "pod-39-checkout" in shown(app) or "pod-08-checkout" in shown(app)
        await pilot.press("enter")
        assert app.state.filter.startswith("netns=pod-08")
        await pilot.press("ctrl+l", "v")
        assert "VICTIMS" in shown(app)
        await pilot.press("v", "tab", "down")
        assert app.state.pane == "victims"
        await pilot.press("enter")
        assert app.state.filter == "udp/8125"

    drive(keys, FixedFeed([snapshots.namespaces()]))


def test_escape_walks_back_through_what_was_narrowed() -> None:
    feed = FixedFeed([snapshots.namespaces()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"proto=udp", "enter", "n")
        assert (app.state.mode, app.state.filter) == ("namespaces", "proto=udp")
        await pilot.press("enter")
        first = app.state.filter
        assert first.startswith("proto=udp netns=pod-08")
        assert "Esc back" in shown(app)
        await pilot.press("n", "down", "enter")  # another one, in place of the first
        assert app.state.filter.startswith("proto=udp netns=pod-")
        assert app.state.filter != first
        steps = []
        for _ in range(5):
            await pilot.press("escape")
            steps.append((app.state.mode, app.state.filter))
        assert steps == [
            ("namespaces", "proto=udp"), ("top", first), ("namespaces", "proto=udp"),
            ("top", "proto=udp"), ("top", ""),
        ]  # fmt: skip

    drive(keys, feed)
    assert [one[2] for one in feed.views][-1] == ""


def test_groupings_that_cannot_be_filtered_so_are_passed_over_and_said() -> None:
    feed = FixedFeed([samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"src=10.0.0.0/8", "enter", "g")
        assert app.state.group == "pod"
        assert "rows by processes can't be filtered by src" in shown(app)
        await pilot.press("slash", "ctrl+u", *"dst=10.0.0.1 src=10.0.0.2", "enter")
        assert "src and dst together can't be told" in shown(app)

    drive(keys, feed)
    assert {one[0] for one in feed.views} == {"pair", "pod"}
