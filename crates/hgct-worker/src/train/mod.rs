//! One rank of a training run: interprets the plan's schedule with an engine and a communicator.
//!
//! The flow of a step: forward and backward actions move micro-batches along the pipelines; in the
//! last backward of a stage every layer's gradients go to their update owners while earlier layers
//! still compute (`exchange.rs`); the owner adds the contributions in the plan's order, all ranks
//! agree on loss, norm and whether the step counts in one collective, the owner updates
//! (`owned.rs`), and the parameters come back.

mod exchange;
mod generate;
mod owned;
mod progress;
mod step;
mod tokens;

use std::sync::Arc;
use std::time::Duration;

use hgct_comm::{Communicator, Deadline, Received, SendBuffer, Tag};
use hgct_core::ids::Rank;
use hgct_core::job::Recipe;
use hgct_core::plan::{Plan, StageId};
use hgct_core::sample::SampleOrder;
use hgct_core::schedule::{Action, Schedule};
use hgct_core::slice::{Role, Slice};
use hgct_data::TokenFile;

use self::exchange::Exchange;
use self::owned::Owned;
pub use self::owned::Snapshot;
pub use self::progress::Progress;
pub use self::step::StepOutcome;
use crate::engine::{Engine, StageLoad};
use crate::{Error, Result};

/// What a rank needs to train.
pub struct TrainerOptions {
    /// The plan, validated.
    pub plan: Arc<Plan>,
    /// This rank.
    pub rank: Rank,
    /// The recipe.
    pub recipe: Recipe,
    /// Training tokens.
    pub train: TokenFile,
    /// Held-out tokens.
    pub held_out: Option<TokenFile>,
    /// Deadline of every wait inside of a step.
    pub step_deadline: Duration,
    /// Where progress is told.
    pub progress: Arc<Progress>,
}

/// One rank with its stages loaded.
pub struct Trainer {
    plan: Arc<Plan>,
    rank: Rank,
    recipe: Recipe,
    engine: Box<dyn Engine>,
    stages: Vec<StageId>,
    schedule: Vec<Action>,
    evaluation: Vec<Action>,
    order: SampleOrder,
    train: TokenFile,
    held_out: Option<TokenFile>,
    exchange: Exchange,
    owned: Owned,
    /// `None` where the plan has one rank.
    comm: Option<Communicator>,
    step_deadline: Duration,
    progress: Arc<Progress>,
    num_updates: u64,
    collectives: u64,
    /// Whether what an evaluation runs has been compiled.
    has_evaluated: bool,
}

impl Trainer {
    /// Loads the rank's stages into the engine. Parameters are not there yet.
    pub fn load(mut engine: Box<dyn Engine>, options: TrainerOptions) -> Result<Self> {
        let TrainerOptions { plan, rank, recipe, train, held_out, step_deadline, progress } = options;
        plan.validate()?;
        let mut schedule = Schedule::of(&plan)?;
        let mut evaluation = Schedule::forward_only(&plan)?;
        if rank.index() >= schedule.ranks.len() {
            return Err(Error::Protocol {
                rank,
                message: format!("the plan has {} ranks", plan.ranks.len()),
            });
        }
        let samples = train.samples(plan.seq_len)?.len();
        let order = SampleOrder::new(recipe.seed, samples, u64::from(plan.global_batch));
        let loads: Vec<StageLoad> = plan
            .stages_of(rank)
            .map(|(stage, instance)| StageLoad {
                stage,
                model: plan.model.clone(),
                layers: instance.layers(),
                recompute: instance.recompute,
            })
            .collect();
        engine.load(&loads)?;
        for load in &loads {
            for pipeline in plan.pipelines.iter().filter(|pipeline| pipeline.stages.contains(&load.stage)) {
                engine.warm_up(load.stage, u64::from(pipeline.micro_batch), u64::from(plan.seq_len))?;
            }
        }
        Ok(Self {
            exchange: Exchange::new(&plan, rank),
            owned: Owned::new(&plan, rank),
            schedule: std::mem::take(&mut schedule.ranks[rank.index()]),
            evaluation: std::mem::take(&mut evaluation.ranks[rank.index()]),
            stages: loads.iter().map(|load| load.stage).collect(),
            plan,
            rank,
            recipe,
            engine,
            order,
            train,
            held_out,
            comm: None,
            step_deadline,
            progress,
            num_updates: 0,
            collectives: 0,
            has_evaluated: false,
        })
    }

    /// The rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The plan.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Updates of AdamW so far.
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// Gives the connections to the other ranks.
    pub fn connect(&mut self, comm: Communicator) {
        self.comm = Some(comm);
    }

    /// The connections, if any.
    pub fn comm(&self) -> Option<&Communicator> {
        self.comm.as_ref()
    }

    /// Ends the training and gives the engine back for another load.
    pub fn into_engine(mut self) -> Result<Box<dyn Engine>> {
        self.engine.abort()?;
        self.engine.load(&[])?;
        if let Some(comm) = self.comm.take() {
            comm.close(Deadline::after(Duration::from_secs(2)));
        }
        Ok(self.engine)
    }

    /// Puts restored state in place: rows of a slice that this rank owns.
    pub fn restore(&mut self, slice: &Slice, role: Role, values: &[f32]) -> Result<()> {
        self.owned
            .restore(slice, role, values)
            .map_err(|message| Error::Protocol { rank: self.rank, message })
    }

    /// Before the first step: makes what was not restored from the seed, hands parameters to all
    /// holders and imports this rank's.
    pub fn initialise(&mut self, step: u64, num_updates: u64) -> Result<()> {
        self.num_updates = num_updates;
        self.owned
            .initialise(&self.plan.model, self.recipe.seed)
            .map_err(|message| Error::Protocol { rank: self.rank, message })?;
        let deadline = self.deadline();
        self.exchange.send_parameters(&self.owned, self.comm.as_ref(), step, deadline)?;
        for stage in self.stages.clone() {
            self.exchange.gather(
                stage,
                &self.owned,
                self.engine.as_mut(),
                self.comm.as_ref(),
                step,
                deadline,
            )?;
        }
        self.exchange.end_step();
        Ok(())
    }

    /// A copy of all state that this rank owns, for a checkpoint.
    pub fn snapshot(&self) -> Snapshot {
        self.owned.snapshot()
    }

    /// Queues a message to another rank.
    fn send_to(&self, rank: Rank, tag: Tag, buffer: impl Into<SendBuffer>) -> Result<()> {
        self.connected()?.send(rank, tag, buffer, self.deadline())?;
        Ok(())
    }

    /// Waits for a message of another rank.
    fn recv_from(&self, rank: Rank, tag: Tag) -> Result<Received> {
        Ok(self.connected()?.recv(rank, tag, self.deadline())?)
    }

    fn connected(&self) -> Result<&Communicator> {
        self.comm.as_ref().ok_or_else(|| self.protocol("not connected"))
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.step_deadline)
    }

    fn protocol(&self, message: impl Into<String>) -> Error {
        Error::Protocol { rank: self.rank, message: message.into() }
    }
}
