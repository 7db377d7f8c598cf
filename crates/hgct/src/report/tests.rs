//! The report of a fixed small run against its golden files, and what holds for all of them.

use std::path::{Path, PathBuf};

use hgct_core::canonical::{self, Hash};
use hgct_core::cluster::{Grant, Isolation};
use hgct_core::ids::{DeviceId, Kind, NodeId, Rank, RunId};
use hgct_core::model::{LayerKind, ModelSpec};
use hgct_core::plan::{Plan, PlanBuilder, PlanRank, Prediction, RankPrediction};
use hgct_core::profile::{DeviceProfile, LayerProfile, Profile, Spread};
use hgct_core::timeline::{ActionSpan, RankTimeline, Timeline, TimelineSource, TransferSpan};
use proptest::prelude::*;

use super::summary::{CheckpointSummary, Ended, RunSummary, Sample, SetAside};
use super::*;
use crate::metrics::{CheckpointRow, DeviceRow, EvaluationRow, Row, StepRow, Writer};

const DEVICES: [(&str, &str); 3] = [
    ("local/torch:0", "amd-epyc/torch-cpu"),
    ("local/jax:0", "amd-epyc/jax-cpu"),
    ("local/mlx:0", "amd-epyc/mlx-cpu"),
];

fn plan() -> Plan {
    let model = ModelSpec::from_config_json(
        "c",
        r#"{"model_type": "llama", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
            "num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": true}"#,
    )
    .unwrap();
    let rank = |(device, kind): (&str, &str)| PlanRank {
        device: DeviceId::new(device).unwrap(),
        kind: Kind::new(kind).unwrap(),
        node: NodeId::new("local").unwrap(),
        grant: Grant { cpu_millicores: 600, cores: vec![0], threads: 1, memory_bytes: 2 << 30 },
    };
    let of_rank = |compute_ms: u64, gain| RankPrediction {
        compute_ns: compute_ms * 1_000_000,
        exchange_ns: 30_000_000,
        memory_bytes: 600 << 20,
        gain_permille: gain,
    };
    let mut plan = PlanBuilder::new(model, 128, 32)
        .ranks(DEVICES.map(rank))
        .pipeline(2, 12, &[(Rank(0), 3), (Rank(1), 3)])
        .pipeline(4, 2, &[(Rank(2), 6)])
        .isolation(Isolation::Unisolated)
        .build()
        .unwrap();
    plan.prediction = Some(Prediction {
        step_ns: 362_000_000,
        bound_ns: 341_000_000,
        limited_by: "bubble".into(),
        ranks: vec![of_rank(340, Some(412)), of_rank(330, Some(365)), of_rank(310, None)],
    });
    plan
}

/// Three ranks at their actions for a while each; a pipeline of two, and one alone.
fn timeline(source: TimelineSource, first_step: u64, stretch: f64) -> Timeline {
    let ns = |ms: f64| (ms * stretch * 1e6) as u64 + 5_000_000_000;
    let schedule = hgct_core::schedule::Schedule::of(&plan()).unwrap();
    let ranks = schedule.ranks.iter().enumerate().map(|(rank, list)| {
        let mut at = 3.0 * rank as f64;
        let (mut actions, mut transfers) = (Vec::new(), Vec::new());
        for action in list {
            let text = action.to_string();
            let length = match text.trim_start_matches(|c: char| c.is_ascii_digit()) {
                t if t.starts_with('F') => [9.0, 8.5, 46.0][rank],
                t if t.starts_with('B') => [18.0, 17.0, 94.0][rank],
                t if t.starts_with("RECV") => 1.5,
                "REDUCE" => 12.0,
                "UPDATE" => 8.0,
                "GATHER" => 10.0,
                _ => 0.0,
            };
            let (start_ns, end_ns) = (ns(at), ns(at + length));
            actions.push(ActionSpan { step: first_step, action: *action, start_ns, end_ns });
            if text.contains("RECV") || text.contains("GATHER") || text.contains("SEND") {
                transfers.push(TransferSpan {
                    step: first_step,
                    peer: Rank((rank as u32 + 1) % 3),
                    outgoing: text.contains("SEND"),
                    size_bytes: 131_072,
                    start_ns: ns(at + 0.5),
                    end_ns: ns(at + 2.0),
                });
            }
            at += length + 0.1;
        }
        RankTimeline {
            rank: Rank(rank as u32),
            device: DeviceId::new(DEVICES[rank].0).unwrap(),
            clock_offset_ns: -12,
            clock_uncertainty_ns: 40_000,
            actions,
            transfers,
        }
    });
    Timeline { format: Timeline::FORMAT, source, first_step, ranks: ranks.collect() }
}

fn step(step: u64) -> StepRow {
    let wave = (step as f64 * 1.7).sin();
    let step_seconds = 0.376 + 0.012 * wave;
    let device = |index: usize| DeviceRow {
        device: DeviceId::new(DEVICES[index].0).unwrap(),
        busy_share: [0.86, 0.82, 0.74][index] + 0.01 * wave,
        exchange_seconds: 0.03,
        exposed_communication_seconds: 0.012,
        memory_bytes: (400 + 50 * index as u64) << 20,
    };
    StepRow {
        step,
        loss: if step == 40 { f64::NAN } else { 3.2 + 4.4 * (-(step as f64) / 30.0).exp() + 0.06 * wave },
        grad_norm: 0.8,
        learning_rate: 3e-3,
        skipped: step == 40,
        tokens: 4096,
        step_seconds,
        tokens_per_second: 4096.0 / step_seconds,
        devices: (0..3).map(device).collect(),
        elapsed_seconds: 0.4 * (step + 1) as f64,
    }
}

/// Layers whose times give about these tokens a second alone.
fn profile() -> Profile {
    let device = |((device, kind), tokens_per_second): ((&str, &str), f64)| {
        let sample_ns = 128e9 / tokens_per_second;
        let layer = |layer, share: f64| {
            let spread = |share: f64| {
                let ns = (4.0 * sample_ns * share) as u64;
                Spread { median_ns: ns, min_ns: ns, max_ns: ns, num_samples: 5 }
            };
            LayerProfile {
                layer,
                micro_batch: 4,
                forward: spread(share / 3.0),
                backward: spread(share * 2.0 / 3.0),
                activation_bytes: 4 << 20,
                workspace_bytes: 1 << 20,
            }
        };
        DeviceProfile {
            device: DeviceId::new(device).unwrap(),
            kind: Kind::new(kind).unwrap(),
            environment_hash: Hash::of_bytes(b""),
            framework: kind.into(),
            grant: plan().ranks[0].grant.clone(),
            layers: vec![
                layer(LayerKind::Embedding, 0.01),
                layer(LayerKind::Block, 0.18),
                layer(LayerKind::Head, 0.27),
            ],
            reduce_ps_per_element: 800,
            update_ps_per_element: 4000,
            import_ps_per_byte: 200,
            send_ps_per_byte: 300,
            action_overhead_ns: 0,
            base_memory_bytes: 300 << 20,
        }
    };
    Profile {
        format: Profile::FORMAT,
        measured_at: "2026-01-02T03:04:05Z".into(),
        model: Hash::of(&plan().model),
        seq_len: 128,
        isolation: Isolation::Unisolated,
        devices: DEVICES.into_iter().zip([4650.0, 4120.0, 3200.0]).map(device).collect(),
        links: Vec::new(),
    }
}

fn summary() -> RunSummary {
    let mut summary = RunSummary::of_plan(RunId::new("20260102-030405-quickstart").unwrap(), &plan());
    summary.job = Some("examples/quickstart/job.toml".into());
    summary.started_at = Some("2026-01-02T03:04:05Z".into());
    summary.ended = Ended::Trained;
    summary.steps = 120;
    summary.model.name = "quickstart_llama".into();
    summary.data.name = Some("the sources of 200 crates".into());
    summary.data.tokens = Some(9_400_123);
    summary.data.held_out_tokens = Some(188_002);
    summary.data.bigram_nats = Some(3.9812);
    summary.data.unigram_nats = Some(6.4021);
    for (device, framework) in summary.devices.iter_mut().zip(["torch 2.9.0", "jax 0.8.1", "mlx 0.30.0"]) {
        device.framework = framework.into();
    }
    summary.set_aside = vec![SetAside {
        device: "local/paddle:0".into(),
        reason: "backward: off by 3e-2 | see its log".into(),
    }];
    summary.isolation_note = Some("no cgroup that this user may write".into());
    summary.times.set_up = Some(64.2);
    summary.times.data = Some(6.5);
    summary.times.check = Some(21.4);
    summary.times.profile = Some(38.0);
    summary.times.plan = Some(0.8);
    summary.times.train = Some(50.4);
    summary.times.total = Some(114.9);
    summary.checkpoint = Some(CheckpointSummary {
        path: ".hgct/runs/20260102-030405-quickstart/checkpoints/step-00000120".into(),
        step: 120,
    });
    summary.samples =
        vec![Sample { prompt: "impl fmt::Display for".into(), text: " Error {\n    ```fn fmt(&self".into() }];
    summary.memory.coordinator_bytes = Some(21 << 20);
    summary.memory.agents.insert(NodeId::new("local").unwrap(), 14 << 20);
    summary.memory.plain_loops.insert(DeviceId::new(DEVICES[0].0).unwrap(), 380 << 20);
    summary.events = vec!["step 40 was skipped on all ranks: the loss was not finite".into()];
    summary
}

/// A run's folder with everything in it.
fn folder(parent: &Path) -> PathBuf {
    let folder = parent.join("20260102-030405-quickstart");
    std::fs::create_dir(&folder).unwrap();
    let put = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    put("plan.json", canonical::encode(&plan()));
    put("profile.json", canonical::encode(&profile()));
    put("summary.json", canonical::encode(&summary()));
    put("predicted_timeline.json", canonical::encode(&timeline(TimelineSource::Predicted, 0, 0.96)));
    put("timeline.json", canonical::encode(&timeline(TimelineSource::Measured, 119, 1.0)));
    let mut writer = Writer::open(&folder.join("metrics.jsonl")).unwrap();
    for number in 0..120 {
        writer.write(&Row::Step(step(number))).unwrap();
        if (number + 1) % 30 == 0 {
            let loss = step(number).loss + 0.11;
            writer.write(&Row::Evaluation(EvaluationRow { step: number + 1, loss, tokens: 32_768 })).unwrap();
        }
    }
    writer.write(&Row::Checkpoint(CheckpointRow { step: 120, bytes: 15_400_000, seconds: 0.21 })).unwrap();
    folder
}

#[test]
fn the_report_of_a_small_run_is_its_golden_files() {
    let parent = tempfile::tempdir().unwrap();
    let folder = folder(parent.path());
    write(&folder).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for name in ["report.md", "loss.svg", "timeline.svg"] {
        let written = std::fs::read_to_string(folder.join(name)).unwrap();
        if std::env::var_os("HGCT_UPDATE_GOLDEN").is_some() {
            std::fs::write(golden.join(name), &written).unwrap();
        }
        let wanted = std::fs::read_to_string(golden.join(name)).unwrap();
        assert_eq!(written, wanted, "{name}: HGCT_UPDATE_GOLDEN=1 accepts a wanted change");
    }
}

#[test]
fn figures_follow_from_the_documents() {
    let parent = tempfile::tempdir().unwrap();
    let report = write(&folder(parent.path())).unwrap().report;
    assert_eq!(report.steps.predicted_seconds, Some(0.362), "quoted, not computed");
    assert_eq!((report.steps.trained, report.steps.skipped, report.steps.steady), (120, 1, 109));
    assert_eq!(report.losses.below_bigram, Some(true));
    let printed: serde_json::Value = serde_json::from_str(&canonical::encode(&report)).unwrap();
    assert_eq!(printed["rows"][1]["device"], DEVICES[1].0);
    let shares: f64 = report.devices.iter().map(|device| device.flops_share).sum();
    assert!((shares - 1.0).abs() < 1e-12, "{shares}");
    let together: f64 = report.devices.iter().map(|device| device.tokens_per_second_together.unwrap()).sum();
    assert!((together - report.steps.tokens_per_second.unwrap()).abs() < 1e-6);
    let (_, begin, end) = steady_step(&timeline(TimelineSource::Measured, 119, 1.0)).unwrap();
    assert!(report.devices.iter().all(|device| device.shares.unwrap().total_ns() == end - begin));
    assert_eq!(report.devices[2].layers, "all");
    assert_eq!(report.devices[1].layers, "blocks 3–4, head");
    let alone = report.devices[0].tokens_per_second_alone.unwrap();
    assert!((4400.0..4650.0).contains(&alone), "{alone}: the update counts too");
    // Rank 2 has a quarter of the samples and all layers of them.
    assert!((report.devices[2].flops_share - 0.25).abs() < 1e-12);
}

#[test]
fn a_resumed_run_tells_the_times_of_its_last_plan_and_counts_each_step_once() {
    let parent = tempfile::tempdir().unwrap();
    let folder = folder(parent.path());
    std::fs::remove_file(folder.join("metrics.jsonl")).unwrap();
    let mut writer = Writer::open(&folder.join("metrics.jsonl")).unwrap();
    writer.write(&Row::Begin { step: 0, plan: Hash::of_bytes(b"another") }).unwrap();
    for number in 0..120 {
        let mut slow = step(number);
        slow.step_seconds *= 9.0;
        for device in &mut slow.devices {
            device.memory_bytes *= 9;
        }
        writer.write(&Row::Step(slow)).unwrap();
    }
    writer.write(&Row::Begin { step: 60, plan: Hash::of(&plan()) }).unwrap();
    for number in 60..100 {
        writer.write(&Row::Step(step(number))).unwrap();
    }
    let report = write(&folder).unwrap().report;
    assert_eq!((report.steps.trained, report.steps.steady), (100, 36));
    assert!(report.steps.measured_high_seconds.unwrap() < 0.4);
    assert_eq!(report.devices[0].memory_bytes, Some(400 << 20));
}

#[test]
fn mfu_is_there_where_the_catalogue_knows_every_device() {
    let parent = tempfile::tempdir().unwrap();
    let folder = folder(parent.path());
    let with_kinds = |kinds: [&str; 3]| {
        let mut plan = plan();
        for (rank, kind) in plan.ranks.iter_mut().zip(kinds) {
            rank.kind = Kind::new(kind).unwrap();
        }
        std::fs::write(folder.join("plan.json"), canonical::encode(&plan)).unwrap();
        write(&folder).unwrap()
    };
    let a100 = "nvidia-a100-sxm4-80gb/torch";
    assert_eq!(with_kinds([a100, a100, "amd-epyc/mlx"]).report.steps.mfu, None);
    let written = with_kinds([a100, a100, "iluvatar-bi-v150-64gib/torch"]);
    // No f32 figure of the third.
    assert_eq!(written.report.steps.mfu, None);
    let written = with_kinds([a100, a100, "nvidia-tesla-t4-16gib/torch"]);
    let model = plan().model;
    let flops = model.train_flops(0..model.num_placeable_layers(), 128) * 32.0;
    let expected = flops / written.report.steps.measured_seconds.unwrap() / (2.0 * 19.5e12 + 8.1e12);
    assert!((written.report.steps.mfu.unwrap() / expected - 1.0).abs() < 1e-12);
    assert!(written.markdown.contains("(MFU 0."));
}

#[test]
fn a_run_that_left_only_its_plan_has_a_report() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("r1");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("plan.json"), canonical::encode(&plan())).unwrap();
    let written = write(&folder).unwrap();
    assert!(written.markdown.contains("No step was measured.") && written.markdown.contains("unisolated"));
    assert!(!folder.join("loss.svg").exists() && !folder.join("trace.json").exists());
    assert!(folder.join("report.md").exists() && !canonical::encode(&written.report).is_empty());
}

#[test]
fn damage_is_an_error_that_names_the_file() {
    let parent = tempfile::tempdir().unwrap();
    let error = write(parent.path()).unwrap_err().to_string();
    assert!(error.contains("plan.json"), "{error}");
    let folder = folder(parent.path());
    std::fs::write(folder.join("timeline.json"), "{\"format\": 1,\n").unwrap();
    let error = write(&folder).unwrap_err().to_string();
    assert!(error.contains("timeline.json, line 2"), "{error}");
    assert!(!folder.join("report.md").exists());
}

/// Complete events of one track nest or lie apart, times are finite, every process has a name.
fn assert_valid_trace(text: &str) {
    let trace: serde_json::Value = serde_json::from_str(text).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let mut named = std::collections::BTreeSet::new();
    let mut tracks = std::collections::BTreeSet::new();
    let mut ends = std::collections::BTreeMap::new();
    let mut complete: Vec<(u64, u64, f64, f64)> = Vec::new();
    for event in events {
        let pid = event["pid"].as_u64().unwrap();
        match event["ph"].as_str().unwrap() {
            "M" if event["name"] == "process_name" => {
                named.insert(pid);
            }
            "M" if event["name"] == "thread_name" => {
                tracks.insert((pid, event["tid"].as_u64().unwrap()));
            }
            "M" => {}
            "i" => {
                assert!(["p", "t"].contains(&event["s"].as_str().unwrap()) && event["ts"].is_number());
            }
            "X" => {
                let (ts, dur) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
                assert!(ts.is_finite() && dur > 0.0);
                complete.push((pid, event["tid"].as_u64().unwrap(), ts, dur));
            }
            other => panic!("phase {other}"),
        }
    }
    complete.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)).then(a.2.total_cmp(&b.2)));
    for (pid, tid, ts, dur) in complete {
        assert!(named.contains(&pid) && tracks.contains(&(pid, tid)), "{pid} {tid} has no name");
        let end = ends.entry((pid, tid)).or_insert(f64::NEG_INFINITY);
        assert!(ts >= *end - 1e-3, "events of track {tid} of process {pid} overlap");
        *end = ts + dur;
    }
}

#[test]
fn the_trace_of_the_small_run_is_valid_and_complete() {
    let measured = timeline(TimelineSource::Measured, 119, 1.0);
    let predicted = timeline(TimelineSource::Predicted, 0, 0.96);
    let text = trace::chrome(Some(&measured), Some(&predicted)).unwrap();
    assert_valid_trace(&text);
    for part in [
        "\"name\":\"0F0\"",
        "\"cat\":\"communication\"",
        "measured rank 0: local/torch:0",
        "predicted rank 2",
        "step 119",
    ] {
        assert!(text.contains(part), "{part}");
    }
    assert_eq!(trace::chrome(None, None), None);
}

proptest! {
    #[test]
    fn any_timeline_makes_a_valid_trace(
        spans in prop::collection::vec((0u64..2, 0u64..1000, 0u64..300, 0usize..5), 0..30),
        transfers in prop::collection::vec((0u64..2, 0u64..1000, 0u64..300, any::<bool>()), 0..30),
    ) {
        let mut timeline = timeline(TimelineSource::Measured, 0, 1.0);
        timeline.ranks.truncate(2);
        let names = ["0F0", "1B7", "0SEND_F1", "0RECV_B1", "0GATHER"];
        for (index, rank) in (0u64..).zip(&mut timeline.ranks) {
            let of_rank = spans.iter().filter(|span| span.0 == index);
            rank.actions = of_rank
                .map(|(_, s, l, n)| ActionSpan { step: *s / 500, action: names[*n].parse().unwrap(), start_ns: *s, end_ns: s + l })
                .collect();
            let of_rank = transfers.iter().filter(|span| span.0 == index);
            rank.transfers = of_rank
                .map(|(_, s, l, out)| TransferSpan { step: 0, peer: Rank(1), outgoing: *out, size_bytes: 1, start_ns: *s, end_ns: s + l })
                .collect();
        }
        if let Some(text) = trace::chrome(Some(&timeline), None) {
            assert_valid_trace(&text);
        }
    }
}
