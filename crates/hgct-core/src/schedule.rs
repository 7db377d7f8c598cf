//! The schedule as data: one ordered list of actions a rank, which the worker only interprets.
//!
//! An action prints as stage, operation and micro-batch: `2F0` is the forward of micro-batch 0 in
//! stage instance 2. Sends never block (they are queued); receives wait. From the last backward of
//! a stage on its gradients leave layer by layer; `REDUCE` is where the rank has handed out all of
//! them, `UPDATE` where it has added what it owns and updated it, `GATHER` where a stage holds its
//! new parameters.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::canonical::Hash;
use crate::ids::Rank;
use crate::plan::{Pipeline, Plan, ScheduleKind, StageId};
use crate::{Error, Result};

/// What an action does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Forward.
    Forward,
    /// Full backward.
    Backward,
    /// Backward for inputs.
    BackwardInput,
    /// Backward for weights.
    BackwardWeight,
    /// Send the activation to the next stage.
    SendActivation,
    /// Wait for the activation of the previous stage.
    RecvActivation,
    /// Send the input's gradient to the previous stage.
    SendGradient,
    /// Wait for the output's gradient from the next stage.
    RecvGradient,
    /// Hand the stage's gradients to their update owners.
    Reduce,
    /// Add, clip and update what this rank owns.
    Update,
    /// Wait for and import the stage's new parameters.
    Gather,
}

const OPERATIONS: [(Operation, &str); 11] = [
    (Operation::Forward, "F"),
    (Operation::Backward, "B"),
    (Operation::BackwardInput, "I"),
    (Operation::BackwardWeight, "W"),
    (Operation::SendActivation, "SEND_F"),
    (Operation::RecvActivation, "RECV_F"),
    (Operation::SendGradient, "SEND_B"),
    (Operation::RecvGradient, "RECV_B"),
    (Operation::Reduce, "REDUCE"),
    (Operation::Update, "UPDATE"),
    (Operation::Gather, "GATHER"),
];

impl Operation {
    /// Whether the operation is about one micro-batch.
    pub fn has_micro_batch(self) -> bool {
        !matches!(self, Self::Reduce | Self::Update | Self::Gather)
    }

    /// Whether the engine computes in it.
    pub fn is_compute(self) -> bool {
        matches!(self, Self::Forward | Self::Backward | Self::BackwardInput | Self::BackwardWeight)
    }
}

/// One entry of a rank's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Action {
    /// The stage instance; `UPDATE` names the rank's first.
    pub stage: StageId,
    /// What to do.
    pub operation: Operation,
    /// Plan-wide id of the micro-batch; 0 where there is none.
    pub micro_batch: u32,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = OPERATIONS.iter().find(|(o, _)| *o == self.operation).map_or("?", |(_, name)| name);
        write!(f, "{}{name}", self.stage.0)?;
        if self.operation.has_micro_batch() { write!(f, "{}", self.micro_batch) } else { Ok(()) }
    }
}

impl FromStr for Action {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::Name {
            what: "action",
            found: text.into(),
            allowed: "STAGE OPERATION MICRO-BATCH, such as 2F0 or 1SEND_F3",
        };
        let digits = |s: &str| s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
        let (stage, rest) = text.split_at(digits(text));
        let (name, micro_batch) =
            rest.split_at(rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len()));
        let operation = OPERATIONS.iter().find(|(_, n)| *n == name).map(|(o, _)| *o).ok_or_else(bad)?;
        if operation.has_micro_batch() == micro_batch.is_empty() {
            return Err(bad());
        }
        Ok(Self {
            stage: StageId(stage.parse().map_err(|_| bad())?),
            operation,
            micro_batch: if micro_batch.is_empty() { 0 } else { micro_batch.parse().map_err(|_| bad())? },
        })
    }
}

impl TryFrom<String> for Action {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Action> for String {
    fn from(action: Action) -> String {
        action.to_string()
    }
}

/// One list of actions a rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// In rank order.
    pub ranks: Vec<Vec<Action>>,
}

impl Schedule {
    /// The schedule of a plan's step. The one way to make it, so that two executors of one plan do
    /// the same thing (P-1).
    pub fn of(plan: &Plan) -> Result<Self> {
        Self::generate(plan, true)
    }

    /// A forward pass over every pipeline's micro-batches without gradients: evaluation.
    pub fn forward_only(plan: &Plan) -> Result<Self> {
        Self::generate(plan, false)
    }

    fn generate(plan: &Plan, train: bool) -> Result<Self> {
        let mut ranks = vec![Vec::new(); plan.ranks.len()];
        let mut used = BTreeSet::new();
        for (index, pipeline) in plan.pipelines.iter().enumerate() {
            let depth = pipeline.stages.len();
            for (position, id) in pipeline.stages.iter().enumerate() {
                if !used.insert(*id) {
                    return Err(Error::NotYet {
                        what: "sharing",
                        value: format!("{id} by two pipelines"),
                        instead: "one pipeline a stage instance",
                    });
                }
                let ids = plan.micro_batches_of(index);
                let order = if train {
                    compute_order(pipeline, position, ids)?
                } else {
                    ids.map(|micro_batch| (Operation::Forward, micro_batch)).collect()
                };
                let list = &mut ranks[plan.stage(*id).rank().index()];
                for (operation, micro_batch) in order {
                    push_with_transfers(
                        list,
                        *id,
                        operation,
                        micro_batch,
                        position > 0,
                        position + 1 < depth,
                    );
                }
            }
        }
        if train {
            for (rank, list) in ranks.iter_mut().enumerate() {
                let stages: Vec<StageId> = plan.stages_of(Rank(rank as u32)).map(|(id, _)| id).collect();
                let plain = |stage: StageId, operation| Action { stage, operation, micro_batch: 0 };
                list.extend(stages.iter().map(|id| plain(*id, Operation::Reduce)));
                list.extend(stages.first().map(|id| plain(*id, Operation::Update)));
                list.extend(stages.iter().map(|id| plain(*id, Operation::Gather)));
            }
        }
        Ok(Self { ranks })
    }

    /// Hash of the schedule's text.
    pub fn hash(&self) -> Hash {
        Hash::of_bytes(self.to_string().as_bytes())
    }

    /// Runs all ranks' lists without doing anything: every receive must meet a send, every backward
    /// its forward, and no rank may wait for ever. Returns the most micro-batches that each stage
    /// has in flight.
    pub fn dry_run(&self, plan: &Plan) -> Result<Vec<u32>> {
        if self.ranks.len() != plan.ranks.len() {
            return Err(Error::Plan {
                invariant: "schedule",
                found: format!("{} lists for {} ranks", self.ranks.len(), plan.ranks.len()),
            });
        }
        let mut run = DryRun {
            plan,
            position: vec![0; self.ranks.len()],
            sent: BTreeSet::new(),
            forwarded: BTreeSet::new(),
            backwarded: BTreeSet::new(),
            in_flight: vec![(0, 0); plan.stages.len()],
        };
        loop {
            let mut moved = false;
            for (rank, list) in self.ranks.iter().enumerate() {
                while let Some(action) = list.get(run.position[rank]) {
                    if !run.step(rank, *action)? {
                        break;
                    }
                    run.position[rank] += 1;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        match (0..self.ranks.len()).find(|rank| run.position[*rank] < self.ranks[*rank].len()) {
            Some(rank) => Err(Error::Plan {
                invariant: "schedule",
                found: format!(
                    "rank {rank} waits for ever at {}\n{self}",
                    self.ranks[rank][run.position[rank]]
                ),
            }),
            None if !run.sent.is_empty() => Err(Error::Plan {
                invariant: "schedule",
                found: format!("{} messages are never received", run.sent.len()),
            }),
            None => Ok(run.in_flight.into_iter().map(|(_, most)| most).collect()),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (rank, list) in self.ranks.iter().enumerate() {
            write!(f, "{rank}:")?;
            for action in list {
                write!(f, " {action}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Order of forwards and backwards of the stage at `position`.
fn compute_order(
    pipeline: &Pipeline,
    position: usize,
    ids: std::ops::Range<u32>,
) -> Result<Vec<(Operation, u32)>> {
    let kind = pipeline.schedule;
    let warm_up = match kind {
        ScheduleKind::OneForwardOneBackward => pipeline.warm_up(position),
        ScheduleKind::GPipe => ids.len(),
        ScheduleKind::Interleaved | ScheduleKind::ZeroBubble => {
            return Err(Error::NotYet {
                what: "schedule",
                value: format!("{kind:?}"),
                instead: "1f1b or gpipe",
            });
        }
    };
    Ok(one_forward_one_backward(ids, warm_up))
}

/// Forwards and backwards of one stage: `warm_up` forwards at most, one forward and one backward in
/// turn, and the backwards that are left. All forwards first is a warm-up of all micro-batches.
pub fn one_forward_one_backward(
    micro_batches: std::ops::Range<u32>,
    warm_up: usize,
) -> Vec<(Operation, u32)> {
    let (mut forwards, mut backwards) = (micro_batches.clone(), micro_batches);
    let mut order = Vec::with_capacity(2 * forwards.len());
    order.extend(forwards.by_ref().take(warm_up).map(|id| (Operation::Forward, id)));
    for id in forwards {
        order.push((Operation::Forward, id));
        order.extend(backwards.next().map(|id| (Operation::Backward, id)));
    }
    order.extend(backwards.map(|id| (Operation::Backward, id)));
    order
}

fn push_with_transfers(
    list: &mut Vec<Action>,
    stage: StageId,
    operation: Operation,
    micro_batch: u32,
    has_previous: bool,
    has_next: bool,
) {
    let (before, after) = match operation {
        Operation::Forward => {
            ((has_previous, Operation::RecvActivation), (has_next, Operation::SendActivation))
        }
        _ => ((has_next, Operation::RecvGradient), (has_previous, Operation::SendGradient)),
    };
    let mut push = |operation| list.push(Action { stage, operation, micro_batch });
    if before.0 {
        push(before.1);
    }
    push(operation);
    if after.0 {
        push(after.1);
    }
}

/// State of a dry run.
struct DryRun<'a> {
    plan: &'a Plan,
    position: Vec<usize>,
    sent: BTreeSet<(Operation, StageId, u32)>,
    forwarded: BTreeSet<(StageId, u32)>,
    backwarded: BTreeSet<(StageId, u32)>,
    in_flight: Vec<(u32, u32)>,
}

impl DryRun<'_> {
    /// Whether the rank can pass the action now.
    fn step(&mut self, rank: usize, action: Action) -> Result<bool> {
        let fail = |found: String| {
            Err(Error::Plan { invariant: "schedule", found: format!("rank {rank}, {action}: {found}") })
        };
        let Some(stage) = self.plan.stages.get(action.stage.index()) else {
            return fail("no such stage".into());
        };
        if stage.rank().index() != rank {
            return fail(format!("the stage is on {}", stage.rank()));
        }
        let micro_batch = action.micro_batch;
        let neighbour = |previous: bool| neighbour(self.plan, action.stage, previous);
        match action.operation {
            Operation::SendActivation | Operation::SendGradient => {
                let Some(to) = neighbour(action.operation == Operation::SendGradient) else {
                    return fail("no stage to send to".into());
                };
                if !self.sent.insert((action.operation, to, micro_batch)) {
                    return fail("sent twice".into());
                }
                Ok(true)
            }
            Operation::RecvActivation => {
                Ok(self.sent.remove(&(Operation::SendActivation, action.stage, micro_batch)))
            }
            Operation::RecvGradient => {
                Ok(self.sent.remove(&(Operation::SendGradient, action.stage, micro_batch)))
            }
            Operation::Forward => {
                if !self.forwarded.insert((action.stage, micro_batch)) {
                    return fail("forward twice".into());
                }
                let (now, most) = &mut self.in_flight[action.stage.index()];
                *now += 1;
                *most = (*most).max(*now);
                Ok(true)
            }
            Operation::Backward | Operation::BackwardInput => {
                if !self.forwarded.contains(&(action.stage, micro_batch))
                    || !self.backwarded.insert((action.stage, micro_batch))
                {
                    return fail("backward before forward, or twice".into());
                }
                self.in_flight[action.stage.index()].0 -= 1;
                Ok(true)
            }
            Operation::BackwardWeight | Operation::Reduce | Operation::Update | Operation::Gather => Ok(true),
        }
    }
}

/// The stage before or after `stage` in its pipeline.
pub fn neighbour(plan: &Plan, stage: StageId, previous: bool) -> Option<StageId> {
    plan.pipelines.iter().find_map(|pipeline| {
        let at = pipeline.stages.iter().position(|id| *id == stage)?;
        let to = if previous { at.checked_sub(1)? } else { at + 1 };
        pipeline.stages.get(to).copied()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_action_reads_what_it_prints(stage: u32, operation in prop::sample::select(OPERATIONS.to_vec()), micro_batch: u32) {
            let operation = operation.0;
            let micro_batch = if operation.has_micro_batch() { micro_batch } else { 0 };
            let action = Action { stage: StageId(stage), operation, micro_batch };
            prop_assert_eq!(action.to_string().parse::<Action>().unwrap(), action);
        }

        #[test]
        fn other_text_is_no_action(text in "[0-9A-Z_ ]{0,12}") {
            if let Ok(action) = text.parse::<Action>() {
                prop_assert_eq!(action.to_string().parse::<Action>().unwrap(), action);
            }
        }
    }

    #[test]
    fn actions_look_as_documented() {
        let forward = Action { stage: StageId(2), operation: Operation::Forward, micro_batch: 0 };
        assert_eq!(forward.to_string(), "2F0");
        for bad in ["", "F0", "2F", "2X0", "2UPDATE1", "4294967296F0", "2F0 ", "é"] {
            assert!(bad.parse::<Action>().is_err(), "{bad:?} was read");
        }
    }
}
