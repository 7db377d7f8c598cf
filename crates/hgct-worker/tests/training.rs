//! Ranks in threads over loopback, each with the reference engine: any plan learns the same.
#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it must be")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hgct_comm::{Communicator, ConnectOptions, Deadline, Listener, Peer, RunKey, Tuning};
use hgct_core::cluster::Grant;
use hgct_core::ids::{DeviceId, Generation, Kind, NodeId, Rank, RunId};
use hgct_core::job::{JobSpec, Recipe};
use hgct_core::model::ModelSpec;
use hgct_core::plan::{Plan, PlanBuilder, PlanRank};
use hgct_core::slice::{Role, Slice};
use hgct_data::TokenFile;
use hgct_data::token_file::{Header, Width};
use hgct_worker::optimizer::Values;
use hgct_worker::reference::ReferenceEngine;
use hgct_worker::train::{Progress, StepOutcome, Trainer, TrainerOptions};

const SEQ_LEN: u32 = 16;
const GLOBAL_BATCH: u32 = 12;

/// A pipeline: its micro-batch size and count, and the layers of each stage.
type Pipeline<'a> = (u32, u32, &'a [(u32, u32)]);

fn model(tied: bool) -> ModelSpec {
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": {tied}}}"#
    );
    ModelSpec::from_config_json("config.json", &text).unwrap()
}

fn recipe() -> Recipe {
    let job = "name = 'x'\n[model]\nconfig = 'c'\n[data]\npaths = ['a']\n[recipe]\nseed = 5\nsteps = 30\nglobal_batch = 12\nseq_len = 16\nlearning_rate = 3e-3\nwarmup_steps = 3\n";
    JobSpec::from_toml("job.toml", job).unwrap().recipe
}

/// Text with structure: each token mostly follows from the one before.
fn write_tokens(path: &Path) {
    let mut state = 1u64;
    let mut token = 0u32;
    let tokens: Vec<u16> = (0..4000)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            token = if state >> 61 == 0 { (state >> 40) as u32 % 40 } else { (token * 3 + 1) % 40 };
            token as u16
        })
        .collect();
    let header = Header {
        vocab_size: 40,
        width: Width::U16,
        end_of_text: 0,
        count: tokens.len() as u64,
        tokenizer_sha256: [0; 32],
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    std::fs::write(path, bytes).unwrap();
}

fn rank(index: usize) -> PlanRank {
    PlanRank {
        device: DeviceId::new(format!("local/reference:{index}")).unwrap(),
        kind: Kind::new("cpu/reference").unwrap(),
        node: NodeId::new("local").unwrap(),
        grant: Grant { cpu_millicores: 1000, cores: vec![], threads: 1, memory_bytes: 1 << 30 },
    }
}

/// One pipeline a row: micro-batch, micro-batches, and (rank, number of layers).
fn plan(model: &ModelSpec, ranks: usize, pipelines: &[Pipeline<'_>], weights: &[f64]) -> Plan {
    let mut builder = PlanBuilder::new(model.clone(), SEQ_LEN, GLOBAL_BATCH).ranks((0..ranks).map(rank));
    for (micro_batch, number, stages) in pipelines {
        let stages: Vec<(Rank, u32)> = stages.iter().map(|(rank, layers)| (Rank(*rank), *layers)).collect();
        builder = builder.pipeline(*micro_batch, *number, &stages);
    }
    builder.owner_weights(weights.to_vec()).build().unwrap()
}

/// All state that ended on the ranks.
type State = Vec<(Slice, Role, Values)>;

/// Trains `plan` from `start` to `end`, restoring `state` first; every rank's outcomes must agree.
fn train(plan: &Plan, tokens: &Path, start: u64, end: u64, state: &State) -> (Vec<StepOutcome>, State, f64) {
    let run = RunId::new("test").unwrap();
    let listeners: Vec<Listener> =
        plan.ranks.iter().map(|_| Listener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap()).collect();
    let group: Vec<Peer> = listeners
        .iter()
        .enumerate()
        .map(|(rank, listener)| Peer {
            rank: Rank(rank as u32),
            host_id: "here".into(),
            endpoints: listener.endpoints(),
        })
        .collect();
    let one = |me: usize| {
        let options = TrainerOptions {
            plan: Arc::new(plan.clone()),
            rank: Rank(me as u32),
            recipe: recipe(),
            train: TokenFile::open(tokens).unwrap(),
            held_out: Some(TokenFile::open(tokens).unwrap()),
            step_deadline: Duration::from_secs(20),
            progress: Arc::new(Progress::default()),
        };
        let engine = Box::new(ReferenceEngine::new());
        let mut trainer = Trainer::load(engine, options).unwrap();
        if group.len() > 1 {
            let options = ConnectOptions {
                group: group.clone(),
                me: Rank(me as u32),
                generation: Generation::default(),
                run: run.clone(),
                key: RunKey::derive(b"the token of this test", &run),
                listener: &listeners[me],
                deadline: Deadline::after(Duration::from_secs(10)),
                shared_memory: me.is_multiple_of(2),
                test_delay_ns: 0,
                tuning: Tuning::default(),
            };
            trainer.connect(Communicator::connect(&options).unwrap());
        }
        for (slice, role, values) in state {
            for group in plan.owners.iter().filter(|group| group.owner.index() == me) {
                for common in group.slices.iter().filter_map(|own| own.intersection(slice)) {
                    let width = slice.num_elements() / (slice.end[0] - slice.begin[0]);
                    let first = ((common.begin[0] - slice.begin[0]) * width) as usize;
                    let part = &values[first..first + common.num_elements() as usize];
                    trainer.restore(&common, *role, part).unwrap();
                }
            }
        }
        trainer.initialise(start, start).unwrap();
        let outcomes: Vec<StepOutcome> =
            (start..end).map(|step| trainer.step(step, false).unwrap()).collect();
        let (loss, tokens) = trainer.evaluate(end).unwrap().unwrap();
        let written = trainer.generate(&[vec![1, 2], vec![3, 4]], 3, 1, 0.0).unwrap();
        let entries = trainer.snapshot().entries;
        (outcomes, entries, loss / tokens as f64, written)
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = (0..plan.ranks.len()).map(|me| scope.spawn(move || one(me))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (outcomes, _, held_out, _) in &results {
        assert_eq!(held_out.to_bits(), results[0].2.to_bits());
        for (a, b) in outcomes.iter().zip(&results[0].0) {
            assert_eq!(a.loss_sum.to_bits(), b.loss_sum.to_bits());
            assert_eq!(a.grad_norm.to_bits(), b.grad_norm.to_bits());
        }
    }
    assert_eq!(results.iter().filter(|(_, _, _, written)| written.is_some()).count(), 1, "one rank writes");
    let mut state: State = results.iter().flat_map(|(_, state, _, _)| state.clone()).collect();
    state.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    (results[0].0.clone(), state, results[0].2)
}

fn assert_same(a: &[StepOutcome], b: &[StepOutcome], what: &str) {
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        let error = (a.loss_sum / b.loss_sum - 1.0).abs();
        assert!(error < 1e-5, "{what}, step {step}: {} against {}", a.loss_sum, b.loss_sum);
    }
}

#[test]
fn every_plan_learns_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    write_tokens(&tokens);
    for tied in [false, true] {
        let model = model(tied);
        let (alone, ..) = train(&plan(&model, 1, &[(3, 4, &[(0, 5)])], &[1.0]), &tokens, 0, 20, &vec![]);
        let drop = alone[0].loss_sum - alone[19].loss_sum;
        assert!(
            drop > 0.1 * alone[0].loss_sum,
            "it does not learn: {} to {}",
            alone[0].loss_sum,
            alone[19].loss_sum
        );
        let pipeline = plan(&model, 3, &[(2, 6, &[(0, 1), (1, 2), (2, 2)])], &[1.0; 3]);
        assert_same(&train(&pipeline, &tokens, 0, 20, &vec![]).0, &alone, "pipeline");
        let data =
            plan(&model, 3, &[(3, 2, &[(0, 5)]), (1, 4, &[(1, 5)]), (2, 1, &[(2, 5)])], &[3.0, 2.0, 0.5]);
        assert_same(&train(&data, &tokens, 0, 20, &vec![]).0, &alone, "data parallel");
        let mixed =
            plan(&model, 4, &[(2, 4, &[(0, 2), (3, 3)]), (1, 4, &[(1, 4), (2, 1)])], &[1.0, 1.0, 2.0, 0.0]);
        assert_same(&train(&mixed, &tokens, 0, 20, &vec![]).0, &alone, "uneven pipelines");
    }
}

#[test]
fn the_choice_of_owner_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    write_tokens(&tokens);
    let model = model(true);
    let shape: &[Pipeline<'_>] = &[(2, 3, &[(0, 2), (1, 3)]), (3, 2, &[(2, 5)])];
    let norms = |weights: &[f64]| -> Vec<(u64, u64)> {
        let (outcomes, ..) = train(&plan(&model, 3, shape, weights), &tokens, 0, 8, &vec![]);
        outcomes.iter().map(|o| (o.loss_sum.to_bits(), o.grad_norm.to_bits())).collect()
    };
    let first = norms(&[1.0, 1.0, 1.0]);
    assert_eq!(first, norms(&[1.0, 1.0, 1.0]), "the same plan twice");
    assert_eq!(first, norms(&[0.0, 5.0, 1.0]), "other owners");
}

#[test]
fn resume_under_another_plan_goes_on_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    write_tokens(&tokens);
    let model = model(true);
    let a = plan(&model, 2, &[(3, 4, &[(0, 2), (1, 3)])], &[1.0; 2]);
    let b = plan(&model, 3, &[(2, 3, &[(0, 5)]), (3, 2, &[(1, 3), (2, 2)])], &[1.0, 2.0, 3.0]);
    let (whole, _, held_out) = train(&a, &tokens, 0, 20, &vec![]);
    let (first, state, _) = train(&a, &tokens, 0, 10, &vec![]);
    let (second, _, resumed) = train(&b, &tokens, 10, 20, &state);
    assert_same(&[first, second].concat(), &whole, "20 steps in two parts");
    assert!((held_out / resumed - 1.0).abs() < 1e-5);
}
