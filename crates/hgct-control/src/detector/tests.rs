use hgct_core::cluster::Grant;
use hgct_core::ids::Kind;
use hgct_core::model::ModelSpec;
use hgct_core::plan::{PlanBuilder, PlanRank, Prediction, RankPrediction};

use super::*;

const MS: u64 = 1_000_000;

fn device(index: u32) -> DeviceId {
    DeviceId::new(format!("n/torch:{index}")).unwrap()
}

fn node() -> NodeId {
    NodeId::new("n").unwrap()
}

/// Two ranks, one pipeline, four micro-batches.
fn plan(step_ns: Option<u64>) -> Plan {
    let model = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2}"#;
    let rank = |index| PlanRank {
        device: device(index),
        kind: Kind::new("cpu/torch").unwrap(),
        node: node(),
        grant: Grant { cpu_millicores: 500, cores: Vec::new(), threads: 1, memory_bytes: 1 },
    };
    let builder = PlanBuilder::new(ModelSpec::from_config_json("c", model).unwrap(), 16, 4)
        .ranks([rank(0), rank(1)])
        .pipeline(1, 4, &[(Rank(0), 2), (Rank(1), 2)]);
    match step_ns {
        None => builder,
        Some(step_ns) => builder.prediction(Prediction {
            step_ns,
            bound_ns: step_ns,
            limited_by: "compute".into(),
            ranks: vec![
                RankPrediction {
                    compute_ns: step_ns,
                    exchange_ns: 0,
                    memory_bytes: 1,
                    gain_permille: None
                };
                2
            ],
        }),
    }
    .build()
    .unwrap()
}

/// Both ranks watched from step 0.
fn watching(step_ns: Option<u64>) -> Detector {
    let mut detector = Detector::new(Limits::default());
    let plan = plan(step_ns);
    for rank in [0, 1] {
        let expectation = Expectation::of(&plan, None, Rank(rank));
        detector.watch(&device(rank), Generation::default(), 0, expectation);
    }
    detector
}

/// A beat at `now_ns` that says: in this action for so long. The worker's clock is another one.
fn beat(detector: &mut Detector, now_ns: u64, index: u32, step: u64, action: Option<&str>, for_ns: u64) {
    let clock_ns = 777 * SECOND_NS + now_ns;
    let beat = WorkerBeat {
        now_ns: clock_ns,
        step,
        action: action.map(|text| text.parse().unwrap()),
        waits: false,
        since_ns: clock_ns - for_ns,
        completed: 1,
        memory_bytes: 1,
    };
    detector.agent_heard(now_ns, &node());
    detector.beat(now_ns, &node(), &device(index), Generation::default(), &beat);
}

fn stalled(verdicts: &[Verdict]) -> Vec<DeviceId> {
    verdicts
        .iter()
        .filter_map(|verdict| match verdict {
            Verdict::WorkerStalled { worker, .. } => Some(worker.clone()),
            _ => None,
        })
        .collect()
}

#[test]
fn silence_is_suspect_then_death_and_each_is_said_once() {
    let mut detector = Detector::new(Limits::default());
    detector.agent_heard(0, &node());
    assert_eq!(detector.next_ns(0), Some(1500 * MS));
    assert!(detector.verdicts(1499 * MS).is_empty());
    assert!(matches!(detector.verdicts(1500 * MS)[..], [Verdict::AgentSuspect { .. }]));
    assert!(detector.verdicts(2900 * MS).is_empty());
    assert!(matches!(
        detector.verdicts(3000 * MS)[..],
        [Verdict::AgentDead { silent_ns: 3_000_000_000, .. }]
    ));
    assert!(detector.verdicts(9000 * MS).is_empty());
    assert_eq!(detector.next_ns(9000 * MS), None);
}

#[test]
fn a_word_ends_a_suspicion() {
    let mut detector = Detector::new(Limits::default());
    detector.agent_heard(0, &node());
    detector.verdicts(2000 * MS);
    detector.agent_heard(2500 * MS, &node());
    assert!(detector.verdicts(3500 * MS).is_empty());
}

#[test]
fn a_worker_is_silent_only_while_its_agent_speaks() {
    let mut detector = watching(Some(SECOND_NS));
    beat(&mut detector, 0, 0, 1, Some("0F1"), 0);
    // The agent is held up for 2.9 s; then it speaks first, the worker's beats are behind it.
    assert!(!detector.verdicts(2900 * MS).iter().any(|v| matches!(v, Verdict::WorkerDead { .. })));
    detector.agent_heard(2900 * MS, &node());
    for at in [3000, 3400, 3800, 4200] {
        detector.agent_heard(at * MS, &node());
        assert!(!detector.verdicts(at * MS).iter().any(|v| matches!(v, Verdict::WorkerDead { .. })), "{at}");
    }
    for at in [4700, 5200, 5700] {
        detector.agent_heard(at * MS, &node());
    }
    detector.agent_heard(5950 * MS, &node());
    let verdicts = detector.verdicts(5950 * MS);
    assert!(verdicts.iter().any(|v| matches!(v, Verdict::WorkerDead { .. })), "{verdicts:?}");
}

#[test]
fn the_coordinators_own_pause_is_nobodys_silence() {
    let mut detector = watching(Some(SECOND_NS));
    beat(&mut detector, 0, 0, 1, Some("0F1"), 0);
    detector.forgive(60 * SECOND_NS);
    assert!(detector.verdicts(60 * SECOND_NS).is_empty());
    assert!(!detector.verdicts(64 * SECOND_NS).is_empty());
}

#[test]
fn an_action_may_take_four_times_its_prediction_or_five_seconds() {
    // Eight compute actions in the step: twice the mean is a quarter of it.
    for (step_ns, allowed_ns) in [(SECOND_NS, 5 * SECOND_NS), (40 * SECOND_NS, 40 * SECOND_NS)] {
        let mut detector = watching(Some(step_ns));
        beat(&mut detector, 0, 0, 1, Some("0F1"), allowed_ns);
        beat(&mut detector, 0, 1, 1, Some("1RECV_F1"), allowed_ns);
        assert!(stalled(&detector.verdicts(1)).is_empty(), "slow is not dead");
        beat(&mut detector, 1, 0, 1, Some("0F1"), allowed_ns + 1);
        assert_eq!(stalled(&detector.verdicts(2)), [device(0)]);
        beat(&mut detector, 3, 0, 1, Some("0F1"), allowed_ns + 2);
        assert!(stalled(&detector.verdicts(4)).is_empty(), "said once");
    }
}

#[test]
fn first_actions_warm_up_and_only_they() {
    let mut detector = watching(Some(SECOND_NS));
    beat(&mut detector, 0, 0, 0, Some("0B0"), 100 * SECOND_NS);
    beat(&mut detector, 0, 1, 0, Some("1F0"), 100 * SECOND_NS);
    assert!(stalled(&detector.verdicts(1)).is_empty());
    // The second forward of the first step has a compiled kernel.
    beat(&mut detector, 1, 0, 0, Some("0F1"), 6 * SECOND_NS);
    assert_eq!(stalled(&detector.verdicts(2)), [device(0)]);
    beat(&mut detector, 3, 1, 0, Some("1F0"), 121 * SECOND_NS);
    assert_eq!(stalled(&detector.verdicts(4)), [device(1)]);
}

#[test]
fn a_wait_is_no_stall_while_the_other_computes() {
    let mut detector = watching(Some(SECOND_NS));
    beat(&mut detector, 0, 0, 1, Some("0F1"), SECOND_NS);
    beat(&mut detector, 0, 1, 1, Some("1RECV_F1"), 90 * SECOND_NS);
    assert!(stalled(&detector.verdicts(1)).is_empty());
    // The other has only just begun to wait, or has said nothing since.
    beat(&mut detector, 1, 0, 1, Some("0RECV_B1"), SECOND_NS);
    assert!(stalled(&detector.verdicts(2)).is_empty());
    // Both wait for each other: the longest wait is named.
    beat(&mut detector, 2, 0, 1, Some("0RECV_B1"), 80 * SECOND_NS);
    assert_eq!(stalled(&detector.verdicts(3)), [device(1)]);
}

#[test]
fn the_one_that_computes_is_named_not_the_one_that_waits_for_it() {
    let mut detector = watching(Some(SECOND_NS));
    beat(&mut detector, 0, 0, 1, Some("0RECV_B1"), 60 * SECOND_NS);
    beat(&mut detector, 0, 1, 1, Some("1F1"), 6 * SECOND_NS);
    assert_eq!(stalled(&detector.verdicts(1)), [device(1)]);
}

#[test]
fn without_a_prediction_the_warming_allowance_stands() {
    let mut detector = watching(None);
    beat(&mut detector, 0, 0, 5, Some("0F1"), 119 * SECOND_NS);
    assert!(stalled(&detector.verdicts(1)).is_empty());
    beat(&mut detector, 2, 0, 5, Some("0F1"), 121 * SECOND_NS);
    assert_eq!(stalled(&detector.verdicts(3)), [device(0)]);
}

#[test]
fn beats_of_another_generation_are_life_but_no_progress() {
    let mut detector = watching(Some(SECOND_NS));
    let old = Generation { epoch: 0, sequence: 9 };
    let beat = WorkerBeat {
        now_ns: 90 * SECOND_NS,
        step: 1,
        action: Some("0F1".parse().unwrap()),
        waits: false,
        since_ns: 0,
        completed: 1,
        memory_bytes: 1,
    };
    detector.agent_heard(0, &node());
    detector.beat(0, &node(), &device(0), old, &beat);
    assert!(stalled(&detector.verdicts(1)).is_empty());
    assert_eq!(detector.worker_silence_ns(5, &device(0)), Some(5));
}

#[test]
fn pieces_of_a_checkpoint_are_progress_between_actions() {
    let mut detector = watching(Some(SECOND_NS));
    beat(&mut detector, 0, 0, 9, None, 100 * SECOND_NS);
    detector.progressed(0, &device(0));
    beat(&mut detector, 30 * SECOND_NS, 0, 9, None, 130 * SECOND_NS);
    assert!(stalled(&detector.verdicts(30 * SECOND_NS)).is_empty());
    beat(&mut detector, 121 * SECOND_NS, 0, 9, None, 221 * SECOND_NS);
    assert_eq!(stalled(&detector.verdicts(121 * SECOND_NS)), [device(0)]);
}

#[test]
fn a_disk_that_stood_still_is_no_stall_of_those_whose_pieces_it_takes_again() {
    let mut detector = watching(Some(SECOND_NS));
    let hear = |detector: &mut Detector, now_ns: u64, said_ns: u64| {
        let beat = WorkerBeat {
            now_ns: said_ns,
            step: 9,
            action: None,
            waits: false,
            since_ns: 0,
            completed: 1,
            memory_bytes: 1,
        };
        detector.beat(now_ns, &node(), &device(0), Generation::default(), &beat);
        stalled(&detector.verdicts(now_ns))
    };
    assert!(hear(&mut detector, SECOND_NS, SECOND_NS).is_empty());
    // No beat passes the pieces while the disk stands still; then they come, a beat that waited
    // behind them, and a fresh one.
    detector.progressed(300 * SECOND_NS, &device(0));
    assert!(hear(&mut detector, 300 * SECOND_NS, 2 * SECOND_NS).is_empty());
    assert!(hear(&mut detector, 301 * SECOND_NS, 301 * SECOND_NS).is_empty());
    assert_eq!(hear(&mut detector, 421 * SECOND_NS, 421 * SECOND_NS), [device(0)]);
}

#[test]
fn the_one_that_compiles_an_evaluation_is_named_not_the_one_that_waits_for_it() {
    let mut detector = watching(Some(SECOND_NS));
    let evaluates = |detector: &mut Detector, index: u32, waits: bool, for_s: u64| {
        let now_ns = 500 * SECOND_NS;
        let beat = WorkerBeat {
            now_ns,
            step: 20,
            action: None,
            waits,
            since_ns: now_ns - for_s * SECOND_NS,
            completed: 1,
            memory_bytes: 1,
        };
        detector.beat(1, &node(), &device(index), Generation::default(), &beat);
    };
    evaluates(&mut detector, 0, true, 119);
    evaluates(&mut detector, 1, false, 100);
    assert!(stalled(&detector.verdicts(1)).is_empty(), "kernels compile");
    evaluates(&mut detector, 0, true, 139);
    evaluates(&mut detector, 1, false, 119);
    assert!(stalled(&detector.verdicts(2)).is_empty(), "it waits for the one that compiles");
    evaluates(&mut detector, 0, true, 141);
    evaluates(&mut detector, 1, false, 121);
    assert_eq!(stalled(&detector.verdicts(3)), [device(1)]);
}
