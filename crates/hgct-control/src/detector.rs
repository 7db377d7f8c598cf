//! The failure detector: who is silent, and who makes no progress. Pure: times come in.
//!
//! Two questions with two clocks:
//!
//! - *Alive?* Agents send heartbeats, workers send beats. Silence in the coordinator's clock makes
//!   the sender suspect, then dead. Beats come through agents: while an agent is late, its workers'
//!   silence says nothing of them.
//! - *Progress?* A beat names the action that a worker is in and since when, in the worker's own
//!   clock, so relays and queues do not count. Its allowance is the larger of a floor and a multiple
//!   of the time that the plan predicts for the action. Slow is not dead.
//!
//! What a step costs the first time (kernels compile) is *warming*: in a worker's first step, the
//! first action of each operation of each stage has the warming allowance. A worker that waits for
//! another (receive, reduce, update, gather) is never given up while any other worker is within its
//! allowance: that one may be what it waits for. When all are over theirs and wait, the longest wait
//! is given up. What is no action of the schedule, such as the first evaluation, has the warming
//! allowance too, and a beat says whether it is a wait.

use std::collections::BTreeMap;

use hgct_core::ids::{DeviceId, Generation, NodeId, Rank};
use hgct_core::plan::{Plan, StageId};
use hgct_core::schedule::{Action, Operation, Schedule};
use hgct_core::timeline::Timeline;
use serde::{Deserialize, Serialize};

use crate::message::WorkerBeat;

const SECOND_NS: u64 = 1_000_000_000;

/// How long is too long. Nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Heartbeats and beats come this often.
    pub heartbeat_ns: u64,
    /// Silence that is worth a line.
    pub suspect_ns: u64,
    /// Silence that is death.
    pub dead_ns: u64,
    /// Allowance of what happens for the first time, and of what is no action of the schedule
    /// (evaluation, the end of a checkpoint).
    pub warming_ns: u64,
    /// Smallest allowance of an action.
    pub stall_floor_ns: u64,
    /// Allowance of an action in predicted times of it.
    pub stall_factor: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            heartbeat_ns: SECOND_NS / 2,
            suspect_ns: 3 * SECOND_NS / 2,
            dead_ns: 3 * SECOND_NS,
            warming_ns: 120 * SECOND_NS,
            stall_floor_ns: 5 * SECOND_NS,
            stall_factor: 4,
        }
    }
}

impl Limits {
    /// Whether a heartbeat was missed.
    fn is_late(&self, silent_ns: u64) -> bool {
        silent_ns > self.heartbeat_ns.saturating_mul(2)
    }
}

/// Predicted times of one rank's actions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Expectation {
    /// The rank's first action of each operation in each stage: what compiles.
    first: Vec<Action>,
    /// Longest predicted time of each operation in each stage, as far as known.
    predicted_ns: BTreeMap<(StageId, Operation), u64>,
    /// One step, for actions that wait for others.
    step_ns: Option<u64>,
}

impl Expectation {
    /// What a plan and, where there is one, its simulated timeline say of a rank. Without a timeline
    /// an action of the engine gets twice the rank's mean; without a prediction nothing is known,
    /// and the warming allowance stands.
    pub fn of(plan: &Plan, timeline: Option<&Timeline>, rank: Rank) -> Self {
        let actions = Schedule::of(plan)
            .ok()
            .and_then(|schedule| schedule.ranks.into_iter().nth(rank.index()))
            .unwrap_or_default();
        let key = |action: &Action| (action.stage, action.operation);
        let mut first: Vec<Action> = Vec::new();
        for action in &actions {
            if !first.iter().any(|seen| key(seen) == key(action)) {
                first.push(*action);
            }
        }
        let mut predicted_ns = BTreeMap::new();
        if let Some(row) = plan.prediction.as_ref().and_then(|p| p.ranks.get(rank.index())) {
            let num_compute = actions.iter().filter(|a| a.operation.is_compute()).count().max(1) as u64;
            for action in first.iter().filter(|a| a.operation.is_compute()) {
                predicted_ns.insert(key(action), 2 * row.compute_ns / num_compute);
            }
        }
        for span in timeline.iter().flat_map(|t| &t.ranks).filter(|r| r.rank == rank).flat_map(|r| &r.actions)
        {
            let longest = predicted_ns.entry(key(&span.action)).or_insert(0);
            *longest = (*longest).max(span.end_ns.saturating_sub(span.start_ns));
        }
        Self { first, predicted_ns, step_ns: plan.prediction.as_ref().map(|p| p.step_ns) }
    }

    fn allowed_ns(&self, limits: &Limits, action: Action, is_first_step: bool) -> (u64, bool) {
        let known = if waits(action.operation) {
            self.step_ns
        } else {
            self.predicted_ns.get(&(action.stage, action.operation)).copied().or(self.step_ns)
        };
        let by_plan = known.map_or(limits.warming_ns, |predicted| {
            limits.stall_floor_ns.max(predicted.saturating_mul(limits.stall_factor))
        });
        let warming = is_first_step && self.first.contains(&action);
        (if warming { by_plan.max(limits.warming_ns) } else { by_plan }, warming)
    }
}

/// Whether an action ends only when another worker has done something.
pub(crate) fn waits(operation: Operation) -> bool {
    match operation {
        Operation::RecvActivation
        | Operation::RecvGradient
        | Operation::Reduce
        | Operation::Update
        | Operation::Gather => true,
        Operation::Forward
        | Operation::Backward
        | Operation::BackwardInput
        | Operation::BackwardWeight
        | Operation::SendActivation
        | Operation::SendGradient => false,
    }
}

/// What the detector has found. Each is reported once for each silence or stall.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Verdict {
    /// An agent is late.
    AgentSuspect {
        /// Which.
        node: NodeId,
        /// Silence so far.
        silent_ns: u64,
    },
    /// An agent is given up.
    AgentDead {
        /// Which.
        node: NodeId,
        /// Silence so far.
        silent_ns: u64,
        /// Silence allowed.
        allowed_ns: u64,
    },
    /// A worker's beats are late.
    WorkerSuspect {
        /// Which.
        worker: DeviceId,
        /// Silence so far.
        silent_ns: u64,
    },
    /// A worker is given up: its process is there, its beats are not.
    WorkerDead {
        /// Which.
        worker: DeviceId,
        /// Silence so far.
        silent_ns: u64,
        /// Silence allowed.
        allowed_ns: u64,
    },
    /// A worker is given up: it beats, but completes nothing.
    WorkerStalled {
        /// Which.
        worker: DeviceId,
        /// Where it stands.
        stall: Stall,
    },
}

/// Where a worker stands, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// Step.
    pub step: u64,
    /// Action; `None`: between actions of the schedule.
    pub action: Option<Action>,
    /// Time in it, in the worker's clock.
    pub since_ns: u64,
    /// Time allowed.
    pub allowed_ns: u64,
    /// Whether the allowance was the one of a first time.
    pub warming: bool,
}

#[derive(Debug, Clone, Copy)]
struct Life {
    last_ns: u64,
    reported: Reported,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reported {
    Alive,
    Suspect,
    Dead,
}

#[derive(Debug, Clone)]
struct Watch {
    generation: Generation,
    first_step: u64,
    expectation: Expectation,
    /// The last beat of this generation.
    beat: Option<WorkerBeat>,
    /// In the coordinator's clock, as the next: the last beat was heard.
    heard_ns: u64,
    /// It was heard of something that is no action.
    progressed_ns: Option<u64>,
    stalled: bool,
}

/// The detector's memory: a few words for each agent and worker.
#[derive(Debug, Clone)]
pub struct Detector {
    limits: Limits,
    agents: BTreeMap<NodeId, Life>,
    /// From the first beat of a worker on, with its node.
    workers: BTreeMap<DeviceId, (NodeId, Life)>,
    watched: BTreeMap<DeviceId, Watch>,
}

impl Detector {
    /// Knows nobody.
    pub fn new(limits: Limits) -> Self {
        Self { limits, agents: BTreeMap::new(), workers: BTreeMap::new(), watched: BTreeMap::new() }
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// An agent said anything, or has just joined.
    pub fn agent_heard(&mut self, now_ns: u64, node: &NodeId) {
        let silent_ns = self.agent_silence_ns(now_ns, node).unwrap_or(0);
        if self.limits.is_late(silent_ns) {
            // What its workers said meanwhile is still on its way.
            for (_, life) in self.workers.values_mut().filter(|(on, _)| on == node) {
                life.last_ns = life.last_ns.saturating_add(silent_ns);
            }
        }
        self.agents.insert(node.clone(), Life { last_ns: now_ns, reported: Reported::Alive });
    }

    /// An agent left: nothing is expected of it any more.
    pub fn forget_agent(&mut self, node: &NodeId) {
        self.agents.remove(node);
    }

    /// A worker beat, or said anything else.
    pub fn worker_heard(&mut self, now_ns: u64, node: &NodeId, worker: &DeviceId) {
        let life = Life { last_ns: now_ns, reported: Reported::Alive };
        self.workers.insert(worker.clone(), (node.clone(), life));
    }

    /// A worker's process ended or is being ended.
    pub fn forget_worker(&mut self, worker: &DeviceId) {
        self.workers.remove(worker);
        self.watched.remove(worker);
    }

    /// From now on the worker must progress, from `first_step`.
    pub fn watch(
        &mut self,
        worker: &DeviceId,
        generation: Generation,
        first_step: u64,
        expectation: Expectation,
    ) {
        let watch = Watch {
            generation,
            first_step,
            expectation,
            beat: None,
            heard_ns: 0,
            progressed_ns: None,
            stalled: false,
        };
        self.watched.insert(worker.clone(), watch);
    }

    /// The worker need not progress any more: it has finished.
    pub fn unwatch(&mut self, worker: &DeviceId) {
        self.watched.remove(worker);
    }

    /// A beat of a generation. One of another generation than the watched one is a sign of life and
    /// no more.
    pub fn beat(
        &mut self,
        now_ns: u64,
        node: &NodeId,
        worker: &DeviceId,
        generation: Generation,
        beat: &WorkerBeat,
    ) {
        self.worker_heard(now_ns, node, worker);
        if let Some(watch) = self.watched.get_mut(worker)
            && watch.generation == generation
        {
            watch.beat = Some(beat.clone());
            watch.heard_ns = now_ns;
        }
    }

    /// A worker did something that is no action of the schedule, such as a piece of a checkpoint.
    pub fn progressed(&mut self, now_ns: u64, worker: &DeviceId) {
        if let Some(watch) = self.watched.get_mut(worker) {
            watch.progressed_ns = Some(now_ns);
        }
    }

    /// The coordinator itself stood still for `gap_ns` (its machine slept, its process was stopped):
    /// nobody else is to blame for that silence.
    pub fn forgive(&mut self, gap_ns: u64) {
        let workers = self.workers.values_mut().map(|(_, life)| life);
        for life in self.agents.values_mut().chain(workers) {
            life.last_ns = life.last_ns.saturating_add(gap_ns);
        }
    }

    /// Silence of an agent so far.
    pub fn agent_silence_ns(&self, now_ns: u64, node: &NodeId) -> Option<u64> {
        self.agents.get(node).map(|life| now_ns.saturating_sub(life.last_ns))
    }

    /// Silence of a worker that has beaten once.
    pub fn worker_silence_ns(&self, now_ns: u64, worker: &DeviceId) -> Option<u64> {
        self.workers.get(worker).map(|(_, life)| now_ns.saturating_sub(life.last_ns))
    }

    /// What is new at this time.
    pub fn verdicts(&mut self, now_ns: u64) -> Vec<Verdict> {
        let limits = self.limits;
        let mut verdicts = Vec::new();
        for (node, life) in &mut self.agents {
            let node = node.clone();
            let silent_ns = now_ns.saturating_sub(life.last_ns);
            verdicts.extend(match life.turn(&limits, silent_ns) {
                None => None,
                Some(Reported::Dead) => {
                    Some(Verdict::AgentDead { node, silent_ns, allowed_ns: limits.dead_ns })
                }
                Some(_) => Some(Verdict::AgentSuspect { node, silent_ns }),
            });
        }
        let late: Vec<NodeId> =
            self.agents.keys().filter(|node| self.is_agent_late(now_ns, node)).cloned().collect();
        for (worker, (node, life)) in &mut self.workers {
            if late.contains(node) {
                continue;
            }
            let worker = worker.clone();
            let silent_ns = now_ns.saturating_sub(life.last_ns);
            verdicts.extend(match life.turn(&limits, silent_ns) {
                None => None,
                Some(Reported::Dead) => {
                    Some(Verdict::WorkerDead { worker, silent_ns, allowed_ns: limits.dead_ns })
                }
                Some(_) => Some(Verdict::WorkerSuspect { worker, silent_ns }),
            });
        }
        verdicts.extend(self.stalled());
        verdicts
    }

    /// When [`Self::verdicts`] has something new at the earliest, if nobody is heard before, as
    /// seen at `now_ns`. Stalls change with beats only.
    pub fn next_ns(&self, now_ns: u64) -> Option<u64> {
        let limits = &self.limits;
        let workers = self.workers.values().filter(|(node, _)| !self.is_agent_late(now_ns, node));
        self.agents
            .values()
            .chain(workers.map(|(_, life)| life))
            .filter_map(|life| match life.reported {
                Reported::Alive => Some(life.last_ns.saturating_add(limits.suspect_ns)),
                Reported::Suspect => Some(life.last_ns.saturating_add(limits.dead_ns)),
                Reported::Dead => None,
            })
            .min()
    }

    fn is_agent_late(&self, now_ns: u64, node: &NodeId) -> bool {
        self.agent_silence_ns(now_ns, node).is_some_and(|silent_ns| self.limits.is_late(silent_ns))
    }

    fn stalled(&mut self) -> Vec<Verdict> {
        let limits = self.limits;
        let over: Vec<(DeviceId, Stall, bool)> =
            self.watched.iter().filter_map(|(worker, watch)| watch.over(worker, &limits)).collect();
        // One that is within its allowance, or whose last beat is old, may be what all wait for.
        let someone_else = over.len() < self.watched.len();
        let someone_computes = over.iter().any(|(.., waiting)| !waiting);
        let longest_wait = over.iter().filter(|(.., waiting)| *waiting).max_by_key(|(_, s, _)| s.since_ns);
        let chosen: Vec<(DeviceId, Stall)> = match longest_wait {
            _ if someone_computes => {
                over.iter().filter(|(.., waiting)| !waiting).map(|(w, s, _)| (w.clone(), *s)).collect()
            }
            Some((worker, stall, _)) if !someone_else => vec![(worker.clone(), *stall)],
            _ => Vec::new(),
        };
        let mut verdicts = Vec::new();
        for (worker, stall) in chosen {
            if let Some(watch) = self.watched.get_mut(&worker)
                && !watch.stalled
            {
                watch.stalled = true;
                verdicts.push(Verdict::WorkerStalled { worker, stall });
            }
        }
        verdicts
    }
}

impl Life {
    /// The next thing to report of a silence, if it is new.
    fn turn(&mut self, limits: &Limits, silent_ns: u64) -> Option<Reported> {
        let now = if silent_ns >= limits.dead_ns {
            Reported::Dead
        } else if silent_ns >= limits.suspect_ns {
            Reported::Suspect
        } else {
            Reported::Alive
        };
        let is_new = now > self.reported;
        self.reported = now.max(self.reported);
        is_new.then_some(now)
    }
}

impl Watch {
    /// The stall, if the worker is over its allowance, and whether it waits for others.
    fn over(&self, worker: &DeviceId, limits: &Limits) -> Option<(DeviceId, Stall, bool)> {
        let beat = self.beat.as_ref()?;
        let is_first_step = beat.step <= self.first_step;
        let (allowed_ns, warming) = match beat.action {
            Some(action) => self.expectation.allowed_ns(limits, action, is_first_step),
            None => (limits.warming_ns, is_first_step),
        };
        let mut since_ns = beat.now_ns.saturating_sub(beat.since_ns);
        if let (None, Some(progressed_ns)) = (beat.action, self.progressed_ns) {
            // By the coordinator's clock: a beat that waited behind a piece for the disk is old.
            since_ns = since_ns.min(self.heard_ns.saturating_sub(progressed_ns));
        }
        let waiting = beat.action.map_or(beat.waits, |action| waits(action.operation));
        let stall = Stall { step: beat.step, action: beat.action, since_ns, allowed_ns, warming };
        (since_ns > allowed_ns).then(|| (worker.clone(), stall, waiting))
    }
}

#[cfg(test)]
mod tests;
