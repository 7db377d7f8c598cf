//! Coordinator, agents and workers in a simulated world: hundreds of runs by seed, with crashes,
//! hangs, stalls, partitions and stops at any moment. What must hold whatever happens is in
//! [`check`].

#![allow(clippy::unwrap_used, reason = "a test")]

mod driver;
mod faults;
mod processes;
mod random;
mod scenario;
mod worker;
mod world;

use std::collections::BTreeMap;

use hgct_control::coordinator::{Coordinator, Effect, Event, Failure, Outcome, Phase, Update};
use hgct_core::ids::{Generation, Rank, RunId};

use crate::driver::STEPS;
use crate::scenario::{Fault, FaultKind, Scenario};
use crate::world::{MS, SECOND, World};

fn simulate(scenario: Scenario) -> World {
    let mut world = World::new(scenario);
    world.run();
    world
}

/// The invariants.
fn check(world: &World) {
    let seed = world.scenario.seed;
    let crashed = world.coordinator.is_none();
    let text = format!(
        "seed {seed}: {:?}\nhits {:?}\nending {:?} ended {:?} last alive {} ms\n{}",
        world.scenario,
        world.hits,
        world.ending_ns.map(|ns| ns / MS),
        world.ended.as_ref().map(|(ns, outcome)| (ns / MS, outcome)),
        world.last_alive_ns / MS,
        story(world),
    );

    // It always ends, and soon after the verdict.
    assert!(crashed || world.ended.is_some(), "never ended: {text}");
    if let (Some(ending), Some((ended, _))) = (world.ending_ns, &world.ended) {
        let pauses = world.hits.iter().map(|(_, fault)| match fault.kind {
            FaultKind::PauseCoordinator(for_ns) | FaultKind::SlowDriver(for_ns) => for_ns,
            _ => 0,
        });
        assert!(ended - ending <= 2600 * MS + pauses.sum::<u64>(), "ended too late: {text}");
    }

    // Every process is gone, 5 s after the end at most (a stopped agent, after it runs again).
    assert!(world.processes.values().all(|process| !process.alive), "a worker survived: {text}");
    assert!(world.nodes.values().all(|node| node.agent.is_none()), "an agent survived: {text}");
    let last_hit = world.hits.iter().map(|(at, fault)| at + resumes_ns(fault)).max().unwrap_or(0);
    let end = world.ended.as_ref().map_or(0, |(at, _)| *at).max(last_hit);
    assert!(world.last_alive_ns <= end + 5 * SECOND, "someone stayed too long: {text}");

    commits_are_in_order(world, &text);
    if let Some((_, outcome)) = &world.ended {
        outcome_fits(world, outcome, &text);
    }
    replay_is_the_same(world, &text);
}

/// Steps are committed once and in order, with the loss of their own generation.
fn commits_are_in_order(world: &World, text: &str) {
    let mut generation = Generation::default();
    let mut loads = 0;
    let mut next = 0;
    for (_, update) in &world.updates {
        match update {
            Update::Loaded { generation: new } => {
                assert!(*new > generation, "generations fell: {text}");
                generation = *new;
                next = if loads == 0 { 0 } else { STEPS[0] };
                loads += 1;
            }
            Update::StepCommitted { step, reports } => {
                assert_eq!(*step, next, "a step out of order: {text}");
                assert_eq!(reports.len(), world.scenario.workers.len(), "{text}");
                for report in reports.iter().filter(|report| report.loss_sum.is_finite()) {
                    assert!(
                        report.loss_sum.to_bits() == worker::loss(generation, *step).to_bits(),
                        "a loss of another generation: {text}"
                    );
                }
                next += 1;
            }
            Update::ShardChunk { rank, bytes, .. } => {
                assert_eq!(*bytes, vec![rank.0 as u8; 5], "a chunk was changed: {text}");
            }
            Update::Finished { step, .. } => assert_eq!(*step, next, "finished elsewhere: {text}"),
            _ => {}
        }
    }
}

/// The outcome names something that really happened; nothing happened, nothing is named.
fn outcome_fits(world: &World, outcome: &Outcome, text: &str) {
    let harmful: Vec<&(u64, Fault)> = world.hits.iter().filter(|(_, fault)| !fault.is_harmless()).collect();
    let stops = harmful.iter().any(|(_, fault)| fault.is_stop());
    match outcome {
        Outcome::Completed => {
            assert!(world.scenario.wrong_at.is_none() || stops, "a disagreement went unseen: {text}");
            let committed = world.updates.iter().filter(|(_, u)| matches!(u, Update::StepCommitted { .. }));
            assert_eq!(committed.count() as u64, STEPS[1], "completed without all steps: {text}");
        }
        Outcome::Stopped { .. } => assert!(stops, "stopped by nobody: {text}"),
        Outcome::Aborted { .. } => assert!(!harmful.is_empty(), "aborted for nothing: {text}"),
        Outcome::Failed { failure, .. } => {
            assert!(!failure.to_string().is_empty());
            match &**failure {
                Failure::NotFinite { in_a_row: 3, .. } => {
                    assert!(world.scenario.nan_from.is_some(), "{text}");
                }
                Failure::Disagreement { .. } => assert!(world.scenario.wrong_at.is_some(), "{text}"),
                Failure::TooFewAgents { .. } => assert!(!harmful.is_empty(), "{text}"),
                failure => {
                    let named = |fault: &Fault| {
                        let late = match failure {
                            Failure::Deadline { workers, .. } => workers.as_slice(),
                            _ => &[],
                        };
                        fault.hits(failure.worker().map(|worker| &worker.device), failure.node())
                            || late.iter().any(|worker| fault.hits(Some(&worker.device), Some(&worker.node)))
                    };
                    // A short silence is no cause alone, but may be named beside one.
                    let found = world.hits.iter().find(|(_, fault)| named(fault));
                    let Some((at, fault)) = found.filter(|_| !harmful.is_empty()) else {
                        panic!("an innocent is named: {failure}\n{text}")
                    };
                    if let ([_], Some(ending)) = (world.hits.as_slice(), world.ending_ns)
                        && !matches!(failure, Failure::Deadline { .. })
                    {
                        assert!(ending <= at + fault.verdict_ns(), "a late verdict: {text}");
                    }
                }
            }
        }
    }
}

/// The log of events gives the same updates again.
fn replay_is_the_same(world: &World, text: &str) {
    let run = RunId::new("run-1").unwrap();
    let mut machine = Coordinator::new(world::config(run, world.scenario.nodes.len()), 0);
    let mut updates = Vec::new();
    for (now_ns, event) in &world.log {
        machine.handle(*now_ns, serde_json::from_str::<Event>(event).unwrap());
        while let Some(effect) = machine.poll_effect() {
            if let Effect::Update(update) = effect {
                updates.push(serde_json::to_string(&update).unwrap());
            }
        }
    }
    let first: Vec<String> =
        world.updates.iter().map(|(_, update)| serde_json::to_string(update).unwrap()).collect();
    assert_eq!(updates, first, "a replay differs: {text}");
    assert!(machine.phase() == Phase::Ended || world.coordinator.is_none(), "{text}");
}

/// When a fault lets go of what it holds.
fn resumes_ns(fault: &Fault) -> u64 {
    match fault.kind {
        FaultKind::HangAgent(_, for_ns)
        | FaultKind::PauseCoordinator(for_ns)
        | FaultKind::SlowDriver(for_ns) => for_ns,
        _ => 0,
    }
}

fn story(world: &World) -> String {
    let told = world.updates.iter().filter(|(_, update)| {
        !matches!(
            update,
            Update::AgentAlive { .. } | Update::WorkerAlive { .. } | Update::StepCommitted { .. }
        )
    });
    let lines = told.map(|(at, update)| {
        let text: String = format!("{update:?}").chars().take(300).collect();
        format!("  {} ms {text}", at / MS)
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_quiet_run_completes() {
    for seed in 0..20 {
        let world = simulate(Scenario::quiet(seed));
        check(&world);
        assert!(matches!(world.ended, Some((_, Outcome::Completed))), "seed {seed}:\n{}", story(&world));
        // Agents that have left are not waited for: a second of grace and the way there and back.
        let took_ns = world.ended.map_or(0, |(at, _)| at) - world.ending_ns.unwrap_or(0);
        assert!(took_ns < 1500 * MS, "seed {seed}: {} ms to the end", took_ns / MS);
    }
}

#[test]
fn a_first_evaluation_may_compile_as_long_as_a_first_step() {
    for seed in 0..20 {
        let compile_ns = Some(11 * SECOND);
        let world = simulate(Scenario { compile_ns, ..Scenario::quiet(seed) });
        check(&world);
        assert!(matches!(world.ended, Some((_, Outcome::Completed))), "seed {seed}:\n{}", story(&world));
        let evaluations = world.updates.iter().filter(|(_, u)| matches!(u, Update::Evaluated { .. }));
        assert_eq!(evaluations.count(), 2, "seed {seed}");
    }
}

#[test]
fn one_that_never_ends_an_evaluation_is_named_not_those_that_wait_for_it() {
    for seed in 0..20 {
        let compile_ns = Some(60 * SECOND);
        let world = simulate(Scenario { compile_ns, ..Scenario::quiet(seed) });
        let Some((_, Outcome::Failed { failure, .. })) = &world.ended else {
            panic!("seed {seed}:\n{}", story(&world));
        };
        let Failure::WorkerStalled { worker, stall } = &**failure else { panic!("seed {seed}: {failure}") };
        assert_eq!(worker.rank.map(|(rank, _)| rank), Some(Rank(0)), "seed {seed}: {failure}");
        assert_eq!((stall.action, stall.step), (None, 2), "seed {seed}: {failure}");
    }
}

#[test]
fn harmless_faults_hurt_nobody() {
    for seed in 0..60 {
        let mut scenario = Scenario::random(seed);
        scenario.faults.retain(Fault::is_harmless);
        (scenario.nan_from, scenario.wrong_at) = (None, None);
        // Two of them at once may add up to more than is harmless.
        scenario.faults.truncate(1);
        let world = simulate(scenario);
        check(&world);
        assert!(matches!(world.ended, Some((_, Outcome::Completed))), "seed {seed}:\n{}", story(&world));
    }
}

#[test]
fn whatever_happens_the_invariants_hold() {
    let mut outcomes: BTreeMap<String, u32> = BTreeMap::new();
    for seed in 1000..1500 {
        let world = simulate(Scenario::random(seed));
        check(&world);
        *outcomes.entry(kind(&world)).or_default() += 1;
    }
    // The seeds reach all corners: a change that makes a kind of end vanish is seen.
    for expected in ["completed", "stopped", "aborted", "crashed", "agent-lost", "worker-exited"] {
        assert!(outcomes.get(expected).is_some_and(|count| *count >= 10), "{expected}: {outcomes:?}");
    }
    for expected in ["worker-failed", "worker-silent", "worker-stalled", "not-finite", "disagreement"] {
        assert!(outcomes.contains_key(expected), "{expected}: {outcomes:?}");
    }
}

fn kind(world: &World) -> String {
    let Some((_, outcome)) = &world.ended else { return "crashed".into() };
    let value = match outcome {
        Outcome::Failed { failure, .. } => serde_json::to_value(failure).unwrap(),
        other => serde_json::to_value(other).unwrap(),
    };
    value["type"].as_str().unwrap_or_default().into()
}
