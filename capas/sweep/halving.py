"""Run a grid by successive halving: all trials to the first rung, the best of them to the next one.

A rung pauses the training of an experiment, which later goes on from its checkpoint
(`capas.training.pause`): the trial that ends is the one that would have been trained alone, with the same
bytes. All replicates of a setting go on together, and the values of conf/ always, because the verdict
compares the best with them.
"""

import logging
import statistics
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

from capas.sweep.display import Screen
from capas.sweep.names import distinct
from capas.sweep.plan import Plan, digest
from capas.sweep.ranking import Overrides, split
from capas.sweep.rungs import Ladder, fractions, num_going_on, score_of
from capas.sweep.state import CACHED, DONE, DROPPED, PAUSED, read_states
from capas.sweep.task import Task, defaults

log = logging.getLogger("capas")
Launch = Callable[
    [list[str]], str
]  # runs Hydra with these overrides, returns what it wrote to standard error


class Halving:
    """The trials of a grid that still train, rung by rung."""

    def __init__(self, plan: Plan, task: Task, screen: Screen) -> None:
        self.plan, self.task, self.screen, self.settings = plan, task, screen, task.settings
        self._identities = [digest(point.values, plan.inputs) for point in task.points]
        self._defaults = {split(found, self.settings["replicates"])[0] for found in defaults(task)}
        self._alive = list(range(len(task.points)))

    def run(self, launch: Launch) -> str:
        """Run all rungs; return what the last launch wrote to standard error."""
        self.plan.write_trials([(point.overrides, point.values) for point in self.task.points])
        left, stderr = list(self._alive), ""
        for fraction in [*fractions(self.settings), None]:
            if left:
                stderr = launch(self._words(left, fraction))
            if fraction is not None:
                left = self._select(fraction)
        return stderr

    def _words(self, trials: Sequence[int], fraction: Fraction | None) -> list[str]:
        """Return the overrides with which Hydra runs the trials by their numbers, whatever the launcher."""
        rung = [f"+sweep.rung={fraction}"] if fraction else []
        numbers = ",".join(map(str, trials))
        return [*self.task.common, "hydra.sweeper.params=null", *rung, f"+sweep.trial={numbers}"]

    def _select(self, fraction: Fraction) -> list[int]:
        """Drop the trials that are not among the best at this rung; return those that train on.

        Trials that had ended before, as experiments, stay without being trained.
        """
        self.screen.report()
        states = {state.identity: state for state in read_states(self.plan.points)}
        scores = self._scores(fraction)
        ranked = sorted(scores, key=lambda setting: (scores[setting], setting))
        best = ranked[: num_going_on(len(ranked), self.settings["reduction_factor"])]
        if ranked:
            log.info("%s", self._in_words(fraction, ranked, best))
        kept, of = {*best, *self._defaults}, {t: states[self._identities[t]] for t in self._alive}
        paused = [trial for trial in self._alive if of[trial].status == PAUSED]
        going = [trial for trial in paused if self._setting(trial) in kept]
        for trial in paused:
            if trial in going:
                of[trial].remove(self.plan.points)  # the next launch waits for a new state
            else:
                of[trial].write(self.plan.points, status=DROPPED)
        self._alive = [t for t in self._alive if t in going or of[t].status in (DONE, CACHED)]
        return going

    def _in_words(
        self, fraction: Fraction, ranked: Sequence[Overrides], best: Collection[Overrides]
    ) -> str:
        """Return what goes on, as one line."""
        ladders = [Ladder.of(self.plan.folder, self._identities[trial]) for trial in self._alive]
        rung = next(found for ladder in ladders if (found := ladder.rungs.get(str(fraction))))
        names = [" ".join(distinct(setting, self.plan.swept)) for setting in best]
        if self._defaults & {*ranked} - {*best}:
            names.append("the default, to compare with")
        return (
            f"step {rung.step} of {rung.num_steps}: {len(best)} of {len(ranked)} settings go on: "
            f"{'; '.join(names)}"
        )

    def _scores(self, fraction: Fraction) -> dict[Overrides, float]:
        """Return the mean score of each setting of which all trials have reached the rung."""
        scores: dict[Overrides, list[float | None]] = {}
        for trial in self._alive:
            rung = Ladder.of(self.plan.folder, self._identities[trial]).rungs.get(str(fraction))
            found = None if rung is None else score_of(rung, self.settings)
            scores.setdefault(self._setting(trial), []).append(found)
        whole = {s: [x for x in found if x is not None] for s, found in scores.items()}
        return {s: statistics.fmean(x) for s, x in whole.items() if len(x) == len(scores[s])}

    def _setting(self, trial: int) -> Overrides:
        return split(self.task.points[trial].overrides, self.settings["replicates"])[0]
