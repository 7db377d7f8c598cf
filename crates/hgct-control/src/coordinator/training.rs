//! One load of one plan: load, connect, restore, start, steps, finish.

use std::collections::{BTreeMap, BTreeSet};

use hgct_core::ids::{DeviceId, Generation, NodeId, Rank};
use hgct_core::slice::{Role, Slice};

use super::outcome::{Failure, Outcome};
use super::steps::{Fault, Steps};
use super::{Coordinator, LoadSpec, Phase, Update};
use crate::detector::Expectation;
use crate::frame;
use crate::message::{FromWorker, StepReport, ToWorker};

/// Skipped steps in a row that end the run.
const MOST_SKIPPED: u32 = 3;

/// Ranks name what is late; the coordinator itself waits this much longer for their word.
const WORD_NS: u64 = 1_000_000_000;

/// A plan under its generation.
#[derive(Debug)]
pub(super) struct Training {
    pub(super) generation: Generation,
    /// In rank order.
    devices: Vec<DeviceId>,
    ranks: BTreeMap<DeviceId, Rank>,
    expectations: Vec<Expectation>,
    /// Ranks that owe the answer of this phase.
    waiting: BTreeSet<Rank>,
    unfinished: BTreeSet<Rank>,
    /// From the start on.
    steps: Option<Steps>,
    first_step: u64,
    stopped: bool,
}

impl Training {
    pub(super) fn rank(&self, device: &DeviceId) -> Option<Rank> {
        self.ranks.get(device).copied()
    }

    pub(super) fn device(&self, rank: Rank) -> Option<&DeviceId> {
        self.devices.get(rank.index())
    }

    /// Steps trained and committed.
    pub(super) fn committed(&self) -> Option<u64> {
        self.steps.as_ref().map(Steps::next)
    }

    fn all_ranks(&self) -> BTreeSet<Rank> {
        (0..self.devices.len() as u32).map(Rank).collect()
    }
}

impl Coordinator {
    pub(super) fn load(&mut self, now_ns: u64, spec: &LoadSpec) {
        let devices: Vec<DeviceId> = spec.plan.ranks.iter().map(|rank| rank.device.clone()).collect();
        if let Some(reason) = devices.iter().find_map(|device| self.idle(device).err()) {
            self.reject("load", reason);
            return;
        }
        if self.stop_requested {
            self.reject("load", "a stop was asked for: end the run");
            return;
        }
        if let Err(error) = spec.plan.validate() {
            self.reject("load", error.to_string());
            return;
        }
        self.generation = self.generation.next();
        let ranks = (0..devices.len() as u32).map(Rank);
        let timeline = spec.timeline.as_ref();
        let training = Training {
            generation: self.generation,
            ranks: devices.iter().cloned().zip(ranks.clone()).collect(),
            expectations: ranks.clone().map(|rank| Expectation::of(&spec.plan, timeline, rank)).collect(),
            waiting: ranks.clone().collect(),
            unfinished: BTreeSet::new(),
            steps: None,
            first_step: 0,
            stopped: false,
            devices,
        };
        for (device, rank) in training.devices.iter().zip(ranks) {
            let message = ToWorker::Load {
                generation: self.generation,
                rank,
                plan: Box::new(spec.plan.clone()),
                recipe: spec.recipe.clone(),
                train_tokens: spec.train_tokens.clone(),
                held_out_tokens: spec.held_out_tokens.clone(),
                options: spec.options.clone(),
            };
            self.send_worker(device, message, Vec::new());
        }
        self.training = Some(training);
        let deadline_ns = now_ns.saturating_add(spec.deadline_ns).saturating_add(WORD_NS);
        self.enter(now_ns, Phase::Loading, Some(deadline_ns));
    }

    pub(super) fn state(&mut self, rank: Rank, slice: Slice, role: Role, bytes: Vec<u8>) {
        let device = self.training.as_ref().and_then(|training| training.device(rank)).cloned();
        match device {
            Some(device) if self.phase == Phase::Restoring => {
                self.send_worker(&device, ToWorker::State { slice, role }, bytes);
            }
            _ => self.reject("state", format!("no state for {rank} is taken now: load a plan that has it")),
        }
    }

    pub(super) fn start(&mut self, now_ns: u64, step: u64, num_updates: u64, end_step: u64, allowed_ns: u64) {
        if self.phase != Phase::Restoring || end_step < step {
            self.reject("start", "load a plan first, and start at or before the end step");
            return;
        }
        let Some(training) = &mut self.training else { return };
        training.waiting = training.all_ranks();
        training.unfinished = training.all_ranks();
        training.first_step = step;
        training.steps = Some(Steps::new(step, training.devices.len()));
        self.tell_all(&ToWorker::Start { step, num_updates, end_step });
        let deadline_ns = now_ns.saturating_add(allowed_ns).saturating_add(WORD_NS);
        self.enter(now_ns, Phase::Readying, Some(deadline_ns));
    }

    /// The first stop lets workers finish their step (they agree on it among themselves); the
    /// second does not wait.
    pub(super) fn stop(&mut self, now_ns: u64) {
        if self.stop_requested {
            self.end(now_ns, Outcome::Aborted { reason: "a second stop was asked for".into() });
            return;
        }
        self.stop_requested = true;
        match self.phase {
            Phase::Readying | Phase::Running | Phase::Finishing => {
                self.tell_all(&ToWorker::Stop);
                self.update(Update::Stopping);
            }
            Phase::Ending | Phase::Ended => {}
            _ => {
                let step = self.training.as_ref().and_then(Training::committed);
                self.end(now_ns, Outcome::Stopped { step });
            }
        }
    }

    /// Ranks that have not answered in the time of the phase.
    pub(super) fn training_is_late(&mut self, now_ns: u64, waited_ns: u64) {
        let what = match self.phase {
            Phase::Loading => "load",
            Phase::Connecting => "connect",
            _ => "start",
        };
        let waiting: Vec<Rank> =
            self.training.iter().flat_map(|training| training.waiting.iter().copied()).collect();
        let workers = waiting.into_iter().filter_map(|rank| self.rank_ref(rank)).collect();
        // A failure that is being looked into is the better answer.
        if self.inquest.is_none() {
            self.fail(now_ns, Failure::Deadline { what: what.into(), workers, allowed_ns: waited_ns });
        }
    }

    pub(super) fn worker_message(
        &mut self,
        now_ns: u64,
        node: &NodeId,
        generation: Generation,
        device: DeviceId,
        message: FromWorker,
        payload: Vec<u8>,
    ) {
        // Whatever an ended worker had said before its end is not of interest any more.
        if self.workers.get(&device).is_none_or(|worker| worker.node != *node) {
            return;
        }
        if let FromWorker::Beat(beat) = message {
            self.clocks.entry(device.clone()).or_default().beat(now_ns, beat.now_ns);
            self.detector.beat(now_ns, node, &device, generation, &beat);
            self.update(Update::WorkerAlive { worker: device, beat });
            return;
        }
        self.detector.worker_heard(now_ns, node, &device);
        let ours = self.training.as_ref().filter(|t| t.rank(&device).is_some()).map(|t| t.generation);
        if ours.is_some_and(|ours| frame::fence(generation, ours).is_err()) {
            return;
        }
        if let FromWorker::Failed { error, peer } = message {
            self.worker_says_it_failed(now_ns, generation, &device, error, peer);
            return;
        }
        let Some(message) = self.session_message(generation, &device, message) else { return };
        let rank =
            self.training.as_ref().filter(|t| t.generation == generation).and_then(|t| t.rank(&device));
        if let Some(rank) = rank {
            self.training_message(now_ns, rank, &device, message, payload);
        }
    }

    fn worker_says_it_failed(
        &mut self,
        now_ns: u64,
        generation: Generation,
        device: &DeviceId,
        error: String,
        peer: Option<Rank>,
    ) {
        let worker = self.worker_ref(device);
        let blamed = peer.and_then(|rank| {
            let in_plan = self.training.as_ref().filter(|t| t.generation == generation);
            match in_plan {
                Some(training) => training.device(rank).cloned(),
                None => self.links_peer(generation, rank),
            }
        });
        let blames = blamed.filter(|blamed| blamed != device).map(|blamed| self.worker_ref(&blamed));
        let failure = Failure::WorkerFailed { worker, error, log_tail: String::new() };
        self.worker_failed(now_ns, failure, blames);
    }

    fn training_message(
        &mut self,
        now_ns: u64,
        rank: Rank,
        device: &DeviceId,
        message: FromWorker,
        bytes: Vec<u8>,
    ) {
        let started = matches!(self.phase, Phase::Readying | Phase::Running | Phase::Finishing);
        match message {
            FromWorker::Loaded if self.phase == Phase::Loading => {
                if self.answered(rank) {
                    self.connect_ranks(now_ns);
                }
            }
            FromWorker::Connected if self.phase == Phase::Connecting => {
                if self.answered(rank) {
                    self.enter(now_ns, Phase::Restoring, None);
                    self.update(Update::Loaded { generation: self.generation });
                }
            }
            FromWorker::Ready if self.phase == Phase::Readying => {
                self.watch(rank, device);
                if self.answered(rank) {
                    self.enter(now_ns, Phase::Running, None);
                    self.update(Update::Running);
                }
            }
            FromWorker::StepDone(report) if started => self.step_done(now_ns, rank, report),
            FromWorker::Evaluated { step, loss_sum, num_tokens } if started => {
                self.update(Update::Evaluated { step, loss_sum, num_tokens });
            }
            FromWorker::Spans { step, actions, transfers } if started => {
                let clock = self.clocks.get(device).map(super::steps::Clock::offset).unwrap_or_default();
                self.update(Update::Spans { rank, step, clock, actions, transfers });
            }
            FromWorker::ShardChunk { step, num_updates, offset, end } if started => {
                self.detector.progressed(now_ns, device);
                self.update(Update::ShardChunk { rank, step, num_updates, offset, end, bytes });
            }
            FromWorker::Finished { step, stopped } if started => {
                self.rank_finished(now_ns, rank, device, step, stopped);
            }
            other => {
                self.out_of_order(now_ns, rank, said(&other), format!("nothing of it in {:?}", self.phase));
            }
        }
    }

    /// Strikes the rank off the phase's list; whether it was the last.
    fn answered(&mut self, rank: Rank) -> bool {
        let Some(training) = &mut self.training else { return false };
        training.waiting.remove(&rank) && training.waiting.is_empty()
    }

    fn connect_ranks(&mut self, now_ns: u64) {
        let Some(training) = &mut self.training else { return };
        training.waiting = training.all_ranks();
        let devices = training.devices.clone();
        let deadline_ns = self.deadline_ns.unwrap_or(now_ns);
        let left_ns = deadline_ns.saturating_sub(now_ns).saturating_sub(WORD_NS).max(1);
        let peers = self.peers(&devices);
        self.tell_all(&ToWorker::Connect { peers, deadline_ns: left_ns });
        self.enter(now_ns, Phase::Connecting, Some(deadline_ns));
    }

    fn watch(&mut self, rank: Rank, device: &DeviceId) {
        let Some(training) = &self.training else { return };
        let expectation = training.expectations.get(rank.index()).cloned().unwrap_or_default();
        self.detector.watch(device, training.generation, training.first_step, expectation);
    }

    fn step_done(&mut self, now_ns: u64, rank: Rank, report: StepReport) {
        let Some(steps) = self.training.as_mut().and_then(|training| training.steps.as_mut()) else { return };
        match steps.report(rank, report) {
            Ok(None) => {}
            Ok(Some(committed)) => {
                let (step, in_a_row) = (committed.step, committed.skipped_in_a_row);
                self.update(Update::StepCommitted { step, reports: committed.reports });
                if in_a_row > 0 {
                    self.update(Update::StepSkipped { step, in_a_row });
                }
                if in_a_row >= MOST_SKIPPED {
                    self.fail(now_ns, Failure::NotFinite { step, in_a_row });
                }
            }
            Err(Fault::OutOfOrder { found, expected }) => {
                self.out_of_order(now_ns, rank, format!("step {found}"), format!("step {expected}"));
            }
            Err(Fault::Disagreement { step, first, second }) => {
                if let (Some(a), Some(b)) = (self.rank_ref(first.0), self.rank_ref(second.0)) {
                    let (first, second) = ((a, first.1), (b, second.1));
                    self.fail(now_ns, Failure::Disagreement { step, first, second });
                }
            }
        }
    }

    fn rank_finished(&mut self, now_ns: u64, rank: Rank, device: &DeviceId, step: u64, stopped: bool) {
        let Some(training) = &mut self.training else { return };
        let expected = training.steps.as_ref().map_or(step, |steps| steps.next_of(rank));
        if step != expected || !training.unfinished.remove(&rank) || training.waiting.contains(&rank) {
            let expected = format!("the end after step {expected}, once");
            self.out_of_order(now_ns, rank, format!("the end after step {step}"), expected);
            return;
        }
        self.detector.unwatch(device);
        training.stopped |= stopped;
        // One that came too late for the ranks is still wanted.
        let stopped = training.stopped || self.stop_requested;
        let (is_last, committed) = (training.unfinished.is_empty(), training.committed());
        if !is_last {
            if self.phase == Phase::Running {
                self.enter(now_ns, Phase::Finishing, None);
            }
        } else if committed == Some(step) {
            self.enter(now_ns, Phase::Session, None);
            self.update(Update::Finished { step, stopped });
        } else {
            let expected = format!("the end after step {}", committed.unwrap_or(0));
            self.out_of_order(now_ns, rank, format!("the end after step {step}"), expected);
        }
    }

    fn out_of_order(&mut self, now_ns: u64, rank: Rank, found: String, expected: String) {
        if let Some(worker) = self.rank_ref(rank) {
            self.fail(now_ns, Failure::OutOfOrder { worker, found, expected });
        }
    }

    fn tell_all(&mut self, message: &ToWorker) {
        let devices = self.training.as_ref().map(|training| training.devices.clone()).unwrap_or_default();
        for device in &devices {
            self.send_worker(device, message.clone(), Vec::new());
        }
    }
}

/// What a message is called in an error.
fn said(message: &FromWorker) -> String {
    match message {
        FromWorker::Loaded => "loaded".into(),
        FromWorker::Connected => "connected".into(),
        FromWorker::Ready => "ready".into(),
        FromWorker::StepDone(report) => format!("step {}", report.step),
        FromWorker::Evaluated { step, .. } => format!("an evaluation after step {step}"),
        FromWorker::Spans { step, .. } => format!("spans of step {step}"),
        FromWorker::ShardChunk { step, .. } => format!("a checkpoint after step {step}"),
        FromWorker::Finished { step, .. } => format!("the end after step {step}"),
        _ => "an unexpected message".into(),
    }
}
