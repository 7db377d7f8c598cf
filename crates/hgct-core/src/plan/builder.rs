//! A plan from its few choices; everything else is derived.

use crate::canonical::Hash;
use crate::cluster::Isolation;
use crate::dtype::DType;
use crate::ids::Rank;
use crate::model::ModelSpec;
use crate::schedule::Schedule;
use crate::{Error, Result};

use super::{Pipeline, Plan, PlanRank, Prediction, ScheduleKind, StageId, StageInstance, derive_owners};

/// Builds a [`Plan`] from who computes which layers with which micro-batches: by the planner, by a
/// test, or by a person. Layer ranges, owners and the schedule's hash follow.
///
/// ```
/// # use hgct_core::{plan::*, model::*, ids::*, cluster::*};
/// # let model = ModelSpec::from_config_json("c", r#"{"model_type": "llama", "vocab_size": 64,
/// #   "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}"#)?;
/// # let rank = |name: &str| PlanRank { device: DeviceId::new(name).unwrap(), kind: Kind::new("cpu").unwrap(),
/// #   node: NodeId::new("local").unwrap(),
/// #   grant: Grant { cpu_millicores: 1000, cores: vec![], threads: 1, memory_bytes: 1 << 30 } };
/// // Two stages of two layers each (embedding and a block; a block and the head), 8 micro-batches of 2.
/// let plan = PlanBuilder::new(model, 32, 16)
///     .rank(rank("local/torch:0"))
///     .rank(rank("local/jax:0"))
///     .pipeline(2, 8, &[(Rank(0), 2), (Rank(1), 2)])
///     .build()?;
/// assert_eq!(plan.stages.len(), 2);
/// # Ok::<(), hgct_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PlanBuilder {
    plan: Plan,
    weights: Vec<f64>,
}

impl PlanBuilder {
    /// A plan of `global_batch` samples of `seq_len` tokens a step, without ranks and pipelines yet.
    pub fn new(model: ModelSpec, seq_len: u32, global_batch: u32) -> Self {
        let none = Hash::of_bytes(b"");
        Self {
            plan: Plan {
                format: Plan::FORMAT,
                parent: None,
                job: none.clone(),
                cluster: None,
                profile: None,
                isolation: Isolation::Unisolated,
                model,
                seq_len,
                global_batch,
                ranks: Vec::new(),
                stages: Vec::new(),
                pipelines: Vec::new(),
                owners: Vec::new(),
                wire_dtype: DType::F32,
                master_dtype: DType::F32,
                schedule: none,
                prediction: None,
            },
            weights: Vec::new(),
        }
    }

    /// Adds the next rank.
    #[must_use]
    pub fn rank(mut self, rank: PlanRank) -> Self {
        self.plan.ranks.push(rank);
        self
    }

    /// Adds ranks in order.
    #[must_use]
    pub fn ranks(mut self, ranks: impl IntoIterator<Item = PlanRank>) -> Self {
        self.plan.ranks.extend(ranks);
        self
    }

    /// Adds a 1F1B pipeline: samples a micro-batch, micro-batches a step, and for each stage from
    /// the embedding on its rank and how many layers (embedding and head count as one each).
    #[must_use]
    pub fn pipeline(mut self, micro_batch: u32, num_micro_batches: u32, stages: &[(Rank, u32)]) -> Self {
        let mut ids = Vec::with_capacity(stages.len());
        let mut next = 0u32;
        for (rank, num_layers) in stages {
            ids.push(StageId(self.plan.stages.len() as u32));
            let end = next.saturating_add(*num_layers);
            self.plan.stages.push(StageInstance {
                first_layer: next,
                end_layer: end,
                ranks: vec![*rank],
                recompute: false,
                compute_dtype: DType::F32,
            });
            next = end;
        }
        self.plan.pipelines.push(Pipeline {
            stages: ids,
            micro_batch,
            num_micro_batches,
            schedule: ScheduleKind::OneForwardOneBackward,
            run_ahead: 0,
        });
        self
    }

    /// Lets the last pipeline so far order its micro-batches by `kind`.
    #[must_use]
    pub fn schedule_kind(mut self, kind: ScheduleKind) -> Self {
        if let Some(pipeline) = self.plan.pipelines.last_mut() {
            pipeline.schedule = kind;
        }
        self
    }

    /// Lets the stages of the last pipeline so far run ahead by so many forwards a later stage.
    #[must_use]
    pub fn run_ahead(mut self, run_ahead: u32) -> Self {
        if let Some(pipeline) = self.plan.pipelines.last_mut() {
            pipeline.run_ahead = run_ahead;
        }
        self
    }

    /// Lets every stage instance so far on `rank` recompute.
    #[must_use]
    pub fn recompute(mut self, rank: Rank) -> Self {
        for stage in &mut self.plan.stages {
            stage.recompute |= stage.ranks.contains(&rank);
        }
        self
    }

    /// How much update work each rank should do, relative to the others; without it all alike.
    #[must_use]
    pub fn owner_weights(mut self, weights: Vec<f64>) -> Self {
        self.weights = weights;
        self
    }

    /// Hashes of the documents that the plan was made from.
    #[must_use]
    pub fn made_from(mut self, job: Hash, cluster: Option<Hash>, profile: Option<Hash>) -> Self {
        self.plan.job = job;
        self.plan.cluster = cluster;
        self.plan.profile = profile;
        self
    }

    /// The plan that this one replaces.
    #[must_use]
    pub fn parent(mut self, parent: Hash) -> Self {
        self.plan.parent = Some(parent);
        self
    }

    /// How grants are held; without it `unisolated`.
    #[must_use]
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.plan.isolation = isolation;
        self
    }

    /// What the planner expects.
    #[must_use]
    pub fn prediction(mut self, prediction: Prediction) -> Self {
        self.plan.prediction = Some(prediction);
        self
    }

    /// Derives the rest and checks the result.
    pub fn build(self) -> Result<Plan> {
        let Self { mut plan, weights } = self;
        if let Some(bad) = weights.iter().find(|weight| !weight.is_finite() || **weight < 0.0) {
            return Err(Error::Plan { invariant: "owners", found: format!("an owner weight is {bad}") });
        }
        plan.validate_shape()?;
        plan.owners = derive_owners(&plan.model, &plan.stages, &weights);
        plan.schedule = Schedule::of(&plan)?.hash();
        plan.validate()?;
        Ok(plan)
    }
}
