use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::schedule::{Operation, Schedule};

/// Two blocks and so four layers; tied or not.
pub(crate) fn model(tied: bool) -> ModelSpec {
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 640, "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": {tied}}}"#
    );
    ModelSpec::from_config_json("config.json", &text).unwrap()
}

pub(crate) fn rank(index: u32) -> PlanRank {
    let engine = ["torch", "jax", "paddle", "mlx"][index as usize % 4];
    PlanRank {
        device: DeviceId::new(format!("local/{engine}:{}", index / 4)).unwrap(),
        kind: Kind::new(format!("cpu/{engine}")).unwrap(),
        node: NodeId::new("local").unwrap(),
        grant: Grant { cpu_millicores: 500, cores: vec![0], threads: 1, memory_bytes: 1 << 30 },
    }
}

fn three_stages() -> Plan {
    PlanBuilder::new(model(true), 16, 8)
        .ranks((0..3).map(rank))
        .pipeline(2, 4, &[(Rank(0), 1), (Rank(1), 2), (Rank(2), 1)])
        .build()
        .unwrap()
}

fn pipeline_and_replica() -> Plan {
    PlanBuilder::new(model(true), 16, 11)
        .ranks((0..3).map(rank))
        .pipeline(2, 4, &[(Rank(0), 2), (Rank(2), 2)])
        .pipeline(1, 3, &[(Rank(1), 4)])
        .owner_weights(vec![1.0, 3.0, 0.0])
        .build()
        .unwrap()
}

#[test]
fn three_stage_1f1b_is_its_golden_text() {
    let text = Schedule::of(&three_stages()).unwrap().to_string();
    assert_eq!(text, include_str!("../../tests/golden/three_stages.schedule.txt"));
}

#[test]
fn a_plan_is_its_golden_text_and_reads_back() {
    let text = crate::canonical::encode(&pipeline_and_replica());
    assert_eq!(text, include_str!("../../tests/golden/pipeline_and_replica.plan.json"));
    assert_eq!(Plan::from_json("plan.json", &text).unwrap(), pipeline_and_replica());
}

#[test]
fn a_group_fits_into_a_message_however_large_its_tensors_are() {
    let text = r#"{"model_type": "llama", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 1, "num_attention_heads": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": false}"#;
    let model = ModelSpec::from_config_json("config.json", text).unwrap();
    let layers = model.num_placeable_layers();
    let plan = PlanBuilder::new(model, 16, 8)
        .ranks((0..2).map(rank))
        .pipeline(1, 4, &[(Rank(0), layers)])
        .pipeline(1, 4, &[(Rank(1), layers)])
        .build()
        .unwrap();
    let sizes: Vec<u64> = plan.owners.iter().map(OwnedGroup::num_elements).collect();
    assert!(sizes.iter().all(|size| (1..=MAX_GROUP_ELEMENTS).contains(size)), "{sizes:?}");
    assert_eq!(sizes.iter().sum::<u64>(), plan.model.num_parameters());
    Schedule::of(&plan).unwrap().dry_run(&plan).unwrap();
}

#[test]
fn the_dry_run_counts_micro_batches_in_flight() {
    let plan = three_stages();
    assert_eq!(Schedule::of(&plan).unwrap().dry_run(&plan).unwrap(), [3, 2, 1]);
    let gpipe = PlanBuilder::new(model(false), 16, 8)
        .ranks((0..2).map(rank))
        .pipeline(1, 8, &[(Rank(0), 2), (Rank(1), 2)])
        .schedule_kind(ScheduleKind::GPipe)
        .build()
        .unwrap();
    assert_eq!(Schedule::of(&gpipe).unwrap().dry_run(&gpipe).unwrap(), [8, 8]);
    let mut ahead = three_stages();
    ahead.pipelines[0].run_ahead = 1;
    let most = Schedule::of(&ahead).unwrap().dry_run(&ahead).unwrap();
    assert_eq!(most, [5, 3, 1].map(|n: u32| n.min(ahead.pipelines[0].num_micro_batches)));
}

#[test]
fn a_tied_embedding_has_two_holders_with_their_own_layers() {
    let plan = three_stages();
    let groups: Vec<_> = plan
        .owners
        .iter()
        .filter(|group| group.slices.iter().any(|slice| slice.tensor == crate::model::EMBEDDING))
        .collect();
    let holders = [Holder { stage: StageId(0), layer: 0 }, Holder { stage: StageId(2), layer: 3 }];
    assert!(groups.iter().all(|group| group.holders == holders));
    assert!(groups.iter().all(|group| group.slices.iter().all(|s| s.tensor == crate::model::EMBEDDING)));
    // 640 rows of 128 are two update blocks, one for each holder.
    assert_eq!(groups.iter().map(|group| group.owner).collect::<Vec<_>>(), [Rank(0), Rank(2)]);
    // On one stage it is one tensor, final where the embedding's backward is done.
    let one = PlanBuilder::new(model(true), 16, 2).rank(rank(0)).pipeline(1, 2, &[(Rank(0), 4)]).build();
    let one = one.unwrap();
    let group = one.owners.iter().find(|g| g.slices.iter().any(|s| s.tensor == crate::model::EMBEDDING));
    assert_eq!(group.unwrap().holders, [Holder { stage: StageId(0), layer: 0 }]);
}

#[test]
fn weights_decide_who_updates() {
    let plan = pipeline_and_replica();
    let owned = |rank| plan.owners.iter().filter(|g| g.owner == rank).map(OwnedGroup::num_elements).sum();
    let (a, b, c): (u64, u64, u64) = (owned(Rank(0)), owned(Rank(1)), owned(Rank(2)));
    assert_eq!(a + b + c, plan.model.num_parameters());
    assert_eq!(c, 0, "a weight of zero owns nothing that another holds too");
    assert!(b > a);
}

/// Micro-batch size, micro-batches, and layers a rank.
type Sketch = (u32, u32, Vec<(Rank, u32)>);

#[test]
fn what_a_plan_may_not_be() {
    let build = |pipelines: &[Sketch], ranks: u32| {
        let mut builder = PlanBuilder::new(model(false), 16, 8).ranks((0..ranks).map(rank));
        for (size, count, stages) in pipelines {
            builder = builder.pipeline(*size, *count, stages);
        }
        builder.build().unwrap_err().to_string()
    };
    let (r0, r1) = (Rank(0), Rank(1));
    for (error, expected) in [
        (build(&[(2, 4, vec![(r0, 3)])], 1), "plan: P-2: pipeline 0 ends at layer 3 of 4"),
        (
            build(&[(2, 4, vec![(r0, 0), (r1, 4)])], 2),
            "plan: P-2: pipeline 0: stage 0 has layers 0..0 where layer 0 comes next",
        ),
        (build(&[(2, 3, vec![(r0, 4)])], 1), "plan: P-3: micro-batches hold 6 samples, the global batch 8"),
        (build(&[(2, 4, vec![(r0, 4)])], 2), "plan: ranks: rank 1 (local/jax:0) has no stage; leave it out"),
        (
            build(&[(2, 4, vec![(r0, 2), (Rank(7), 2)])], 2),
            "plan: ranks: stage 1 is on rank 7, but there are 2 ranks",
        ),
        (build(&[], 1), "plan: ranks: rank 0 (local/torch:0) has no stage; leave it out"),
    ] {
        assert_eq!(error, expected);
    }
}

#[test]
fn another_schedule_than_the_plans_is_refused() {
    let mut plan = three_stages();
    plan.pipelines[0].schedule = ScheduleKind::GPipe;
    let error = plan.validate().unwrap_err();
    assert!(matches!(error, Error::Plan { invariant: "P-1", .. }), "{error}");
    plan.pipelines[0].schedule = ScheduleKind::ZeroBubble;
    assert!(matches!(plan.validate(), Err(Error::NotYet { .. })));
}

#[test]
fn owners_meet_where_update_blocks_do() {
    // The tied embedding is 640 rows in two blocks, 0..512 and 512..640, of two owners.
    let cut_at = |row: u64| {
        let mut plan = three_stages();
        let embedding = |slice: &&mut Slice| slice.tensor == crate::model::EMBEDDING;
        let slices: Vec<_> =
            plan.owners.iter_mut().flat_map(|group| &mut group.slices).filter(embedding).collect();
        assert_eq!(slices.iter().map(|slice| slice.rows()).collect::<Vec<_>>(), [0..512, 512..640]);
        for slice in slices {
            let moved = if slice.begin[0] == 0 { &mut slice.end[0] } else { &mut slice.begin[0] };
            *moved = row;
        }
        plan.validate()
    };
    cut_at(512).unwrap();
    for (row, nearest) in [(100, 0), (511, 512), (513, 512), (639, 640)] {
        assert_eq!(
            cut_at(row).unwrap_err().to_string(),
            format!(
                "plan: owners: rank 0 owns model.embed_tokens.weight[0..{row}, 0..128], cut at row {row} \
                 inside of an update block; the nearest cut between blocks is row {nearest}"
            )
        );
    }
}

#[test]
fn a_receive_without_its_send_is_found() {
    let plan = three_stages();
    let mut schedule = Schedule::of(&plan).unwrap();
    schedule.ranks[0].retain(|a| a.operation != Operation::SendActivation || a.micro_batch != 2);
    let error = schedule.dry_run(&plan).unwrap_err().to_string();
    assert!(error.contains("waits for ever at 0RECV_B1"), "{error}");

    let mut schedule = Schedule::of(&plan).unwrap();
    schedule.ranks[1].retain(|a| a.operation != Operation::RecvActivation || a.micro_batch != 2);
    let error = schedule.dry_run(&plan).unwrap_err().to_string();
    assert!(error.contains("1 messages are never received"), "{error}");

    let mut schedule = Schedule::of(&plan).unwrap();
    let last = *schedule.ranks[2].iter().rfind(|a| a.operation == Operation::Backward).unwrap();
    schedule.ranks[2].push(last);
    assert!(schedule.dry_run(&plan).unwrap_err().to_string().contains("or twice"));
}

/// Any split of the model over any few ranks, with any weights.
fn any_plan() -> impl Strategy<Value = Plan> {
    let pipeline = (1u32..4, 1u32..6, prop::collection::btree_set(1u32..4, 0..=2));
    (any::<bool>(), prop::collection::vec(pipeline, 1..4), prop::collection::vec(0.0f64..9.0, 0..10))
        .prop_map(|(tied, pipelines, weights)| {
            let batch = pipelines.iter().map(|(size, count, _)| size * count).sum();
            let mut builder = PlanBuilder::new(model(tied), 8, batch).owner_weights(weights);
            let mut next = 0;
            for (size, count, cuts) in pipelines {
                let bounds: Vec<u32> = [0].into_iter().chain(cuts).chain([4]).collect();
                let stages: Vec<_> = bounds
                    .windows(2)
                    .map(|w| {
                        next += 1;
                        (Rank(next - 1), w[1] - w[0])
                    })
                    .collect();
                builder = builder
                    .ranks((next - stages.len() as u32..next).map(rank))
                    .pipeline(size, count, &stages);
            }
            builder.build().unwrap()
        })
}

/// Replaces the `nth` number of a JSON document.
fn mutate(value: &mut serde_json::Value, nth: &mut usize, with: u64) {
    use serde_json::Value;
    match value {
        Value::Number(_) => {
            if *nth == 0 {
                *value = Value::from(with);
            }
            *nth = nth.wrapping_sub(1);
        }
        Value::Array(items) => {
            for item in items {
                mutate(item, nth, with);
            }
        }
        Value::Object(map) => {
            for item in map.values_mut() {
                mutate(item, nth, with);
            }
        }
        _ => {}
    }
}

/// Removes the `nth` element of any array of a JSON document.
fn shorten(value: &mut serde_json::Value, nth: &mut usize) {
    use serde_json::Value;
    match value {
        Value::Array(items) => {
            if *nth < items.len() {
                items.remove(*nth);
                *nth = usize::MAX;
                return;
            }
            if *nth != usize::MAX {
                *nth -= items.len();
            }
            for item in items {
                shorten(item, nth);
            }
        }
        Value::Object(map) => {
            for item in map.values_mut() {
                shorten(item, nth);
            }
        }
        _ => {}
    }
}

proptest! {
    #[test]
    fn owners_cover_every_element_once(plan in any_plan()) {
        prop_assert_eq!(plan.owners.iter().map(OwnedGroup::num_elements).sum::<u64>(), plan.model.num_parameters());
        for group in &plan.owners {
            let ranks: Vec<Rank> = group.holders.iter().map(|h| plan.stage(h.stage).rank()).collect();
            prop_assert!(ranks.contains(&group.owner));
        }
        let samples: Vec<u64> = plan.micro_batches().into_iter().flat_map(|place| place.samples).collect();
        prop_assert_eq!(samples, (0..u64::from(plan.global_batch)).collect::<Vec<_>>());
    }

    #[test]
    fn owners_do_not_depend_on_the_scale_of_weights(plan in any_plan(), weights in prop::collection::vec(0.1f64..9.0, 9)) {
        let doubled: Vec<f64> = weights.iter().map(|w| w * 2.0).collect();
        prop_assert_eq!(
            derive_owners(&plan.model, &plan.stages, &weights),
            derive_owners(&plan.model, &plan.stages, &doubled)
        );
    }

    #[test]
    fn every_schedule_passes_its_dry_run(plan in any_plan()) {
        for schedule in [Schedule::of(&plan).unwrap(), Schedule::forward_only(&plan).unwrap()] {
            prop_assert!(schedule.dry_run(&plan).is_ok());
            for action in schedule.ranks.iter().flatten() {
                prop_assert_eq!(&action.to_string().parse::<crate::schedule::Action>().unwrap(), action);
            }
        }
    }

    #[test]
    fn damaged_plans_are_refused_without_a_panic(
        plan in any_plan(),
        edits in prop::collection::vec((0usize..300, prop_oneof![0u64..5, Just(u64::from(u32::MAX)), Just(u64::MAX), any::<u64>()]), 1..3),
        cut in prop::option::of(0usize..120),
    ) {
        let mut value = serde_json::to_value(&plan).unwrap();
        for (mut nth, with) in edits {
            mutate(&mut value, &mut nth, with);
        }
        if let Some(mut nth) = cut {
            shorten(&mut value, &mut nth);
        }
        // Whatever still reads is either refused or says the same as before about its invariants.
        if let Ok(damaged) = Plan::from_json("plan.json", &value.to_string()) {
            prop_assert_eq!(damaged.owners.iter().map(OwnedGroup::num_elements).sum::<u64>(), damaged.model.num_parameters());
        }
    }
}
