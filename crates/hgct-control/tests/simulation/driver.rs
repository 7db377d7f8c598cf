//! The driver of the simulated run: every kind of command once, two loads, then the end.

use hgct_control::coordinator::{Command, LoadSpec, Update};
use hgct_control::message::{ToWorker, WorkerOptions, WorkerStart};
use hgct_core::canonical::Hash;
use hgct_core::check::{CheckReport, Verdict};
use hgct_core::cluster::Grant;
use hgct_core::ids::{DeviceId, EnvironmentId, Kind, NodeId, Rank};
use hgct_core::job::Recipe;
use hgct_core::model::ModelSpec;
use hgct_core::plan::{Plan, PlanBuilder, PlanRank, Prediction, RankPrediction};
use hgct_core::slice::{Role, Slice};

use crate::scenario::Scenario;
use crate::world::{MS, SECOND};

pub(crate) const BLOB_BYTES: u64 = 3000;
/// Steps of the first and of the second load.
pub(crate) const STEPS: [u64; 2] = [5, 11];

pub(crate) struct Driver {
    workers: Vec<(NodeId, DeviceId)>,
    loads: usize,
}

impl Driver {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        Self { workers: scenario.workers.clone(), loads: 0 }
    }

    pub(crate) fn react(&mut self, update: &Update) -> Vec<Command> {
        let deadline_ns = 15 * SECOND;
        match update {
            Update::Gathered { .. } => vec![Command::Discover { deadline_ns }],
            Update::Inventory { .. } => {
                let blobs = vec![(Hash::of_bytes(b"blob"), BLOB_BYTES)];
                vec![Command::OfferBlobs { blobs, nodes: Vec::new(), deadline_ns }]
            }
            Update::BlobNeeded { node, hash, offset } => (*offset..BLOB_BYTES)
                .step_by(1000)
                .map(|offset| {
                    let (node, hash) = (node.clone(), hash.clone());
                    Command::BlobChunk { node, hash, offset, bytes: vec![0; 1000] }
                })
                .collect(),
            Update::BlobsHeld { .. } => vec![Command::StartWorkers {
                workers: self.workers.iter().map(|(node, device)| (node.clone(), start(device))).collect(),
                deadline_ns,
            }],
            Update::WorkersStarted { failed, .. } if failed.is_empty() => vec![Command::Ask {
                requests: self.devices().map(|device| (device, check())).collect(),
                deadline_ns,
            }],
            Update::Answered { failed } if failed.is_empty() => {
                vec![Command::MeasureLinks { workers: self.devices().collect(), deadline_ns }]
            }
            Update::LinksMeasured { failed, .. } if failed.is_empty() => {
                vec![Command::HoldGrants { deadline_ns }]
            }
            Update::GrantsHeld { .. } => vec![self.load()],
            Update::Loaded { .. } => {
                let tensor = "model.norm.weight".into();
                let slice = Slice { tensor, begin: vec![0], end: vec![2] };
                let (step, end_step) = if self.loads == 1 { (0, STEPS[0]) } else { (STEPS[0], STEPS[1]) };
                vec![
                    Command::State { rank: Rank(0), slice, role: Role::M, bytes: vec![0; 8] },
                    Command::Start { step, num_updates: step, end_step, deadline_ns },
                ]
            }
            Update::Finished { stopped: false, .. } if self.loads == 1 => vec![self.load()],
            Update::Finished { .. } => vec![Command::End],
            Update::WorkersStarted { .. } | Update::Answered { .. } | Update::LinksMeasured { .. } => {
                vec![Command::Abort { reason: "not all workers are there".into() }]
            }
            // A worker was lost between two commands.
            Update::Rejected { reason, .. } => vec![Command::Abort { reason: reason.clone() }],
            _ => Vec::new(),
        }
    }

    fn devices(&self) -> impl Iterator<Item = DeviceId> + '_ {
        self.workers.iter().map(|(_, device)| device.clone())
    }

    fn load(&mut self) -> Command {
        self.loads += 1;
        Command::Load(Box::new(load_spec(&self.workers)))
    }
}

fn load_spec(workers: &[(NodeId, DeviceId)]) -> LoadSpec {
    let recipe = r#"{"steps": 11, "global_batch": 4, "seq_len": 16, "learning_rate": 0.001}"#;
    let recipe: Recipe = serde_json::from_str(recipe).unwrap();
    LoadSpec {
        plan: plan(workers),
        timeline: None,
        recipe,
        train_tokens: Hash::of_bytes(b"blob"),
        held_out_tokens: None,
        options: WorkerOptions {
            shared_memory: false,
            wire_delay_ns: 0,
            step_deadline_ns: 10 * SECOND,
            timeline_every: 0,
            final_checkpoint: true,
        },
        deadline_ns: 15 * SECOND,
    }
}

fn plan(workers: &[(NodeId, DeviceId)]) -> Plan {
    let model = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 8, "num_attention_heads": 2}"#;
    let model = ModelSpec::from_config_json("config.json", model).unwrap();
    let layers = model.num_placeable_layers();
    let world = workers.len() as u32;
    let stages: Vec<(Rank, u32)> =
        (0..world).map(|rank| (Rank(rank), if rank + 1 == world { layers - rank } else { 1 })).collect();
    let row =
        RankPrediction { compute_ns: 200 * MS, exchange_ns: 20 * MS, memory_bytes: 1, gain_permille: None };
    let prediction = Prediction {
        step_ns: 300 * MS,
        bound_ns: 200 * MS,
        limited_by: "compute".into(),
        ranks: vec![row; workers.len()],
    };
    PlanBuilder::new(model, 16, 4)
        .ranks(workers.iter().map(|(node, device)| PlanRank {
            device: device.clone(),
            kind: Kind::new("cpu/torch").unwrap(),
            node: node.clone(),
            grant: grant(),
        }))
        .pipeline(1, 4, &stages)
        .prediction(prediction)
        .build()
        .unwrap()
}

fn start(device: &DeviceId) -> WorkerStart {
    WorkerStart {
        device: device.clone(),
        environment: EnvironmentId::new("torch").unwrap(),
        device_string: "cpu".into(),
        grant: grant(),
    }
}

fn grant() -> Grant {
    Grant { cpu_millicores: 500, cores: Vec::new(), threads: 1, memory_bytes: 1 }
}

fn check() -> ToWorker {
    ToWorker::Check { kind: Kind::new("cpu/torch").unwrap(), budget_ns: SECOND }
}

pub(crate) fn check_report(device: &DeviceId, kind: Kind) -> CheckReport {
    CheckReport { device: device.clone(), kind, verdict: Verdict::Pass, checks: Vec::new() }
}
