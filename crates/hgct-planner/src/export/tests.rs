#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use super::*;

/// Stages of (first layer, layer past the last, kind), everything else plain.
fn pipeline(
    count: u32,
    micro_batch: u32,
    num_micro_batches: u32,
    stages: &[(u32, u32, &str)],
) -> ExportedPipeline {
    let stage = |(first, end, kind): &(u32, u32, &str)| ExportedStage {
        layers: *first..*end,
        kind: (*kind).into(),
        tensor_parallel: 4,
        expert_parallel: 1,
        replicas: 1,
        recompute: false,
    };
    ExportedPipeline {
        count,
        micro_batch,
        num_micro_batches,
        schedule: Schedule::OneForwardOneBackward,
        run_ahead: 0,
        stages: stages.iter().map(stage).collect(),
    }
}

fn plan(pipelines: Vec<ExportedPipeline>) -> Exported {
    let samples: u32 = pipelines.iter().map(|p| p.count * p.micro_batch * p.num_micro_batches).sum();
    Exported {
        blocks: 24,
        tied_embeddings: Some(false),
        global_batch: samples,
        seq_len: 2048,
        shard_optimizer: true,
        pipelines,
    }
}

/// 24 blocks on three stages, the last of another kind.
fn uneven() -> Exported {
    plan(vec![pipeline(2, 2, 16, &[(0, 8, "A"), (8, 17, "A"), (17, 26, "B")])])
}

fn text(plan: &Exported, target: Target) -> String {
    export(plan, target).unwrap().remove(0).text
}

fn refusal(plan: &Exported, target: Target) -> String {
    export(plan, target).unwrap_err().to_string()
}

/// `--name value value` lines, comments aside.
fn arguments(text: &str) -> BTreeMap<String, Vec<String>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.split(' ');
            let name = words.next().unwrap().strip_prefix("--").unwrap().to_owned();
            (name, words.map(|word| word.trim_matches('"').to_owned()).collect())
        })
        .collect()
}

fn numbers(words: &[String]) -> Vec<u32> {
    words.iter().map(|word| word.parse().unwrap()).collect()
}

/// The documented grammar of a layout: stages split by `|`, commas ignored, `x*N`, `(pattern)*N`.
fn expand(layout: &str) -> Vec<String> {
    fn group(text: &[char], at: &mut usize, depth: u32) -> String {
        let mut out = String::new();
        while *at < text.len() {
            let item = match text[*at] {
                ',' => {
                    *at += 1;
                    continue;
                }
                ')' => {
                    assert!(depth > 0, "an end without a begin");
                    *at += 1;
                    return out;
                }
                '(' => {
                    *at += 1;
                    group(text, at, depth + 1)
                }
                c @ ('E' | 't' | 'm' | 'L' | '|') => {
                    *at += 1;
                    c.to_string()
                }
                other => panic!("{other:?} is no layer"),
            };
            let mut times = 1;
            if text.get(*at) == Some(&'*') {
                let digits: String = text[*at + 1..].iter().take_while(|c| c.is_ascii_digit()).collect();
                *at += 1 + digits.len();
                times = digits.parse().unwrap();
            }
            out.push_str(&item.repeat(times));
        }
        assert_eq!(depth, 0, "a begin without an end");
        out
    }
    let text: Vec<char> = layout.chars().collect();
    group(&text, &mut 0, 0).split('|').map(ToOwned::to_owned).collect()
}

#[test]
fn the_grammar_reads_the_documented_example() {
    let stages = expand("Et*3|(tt|)*29,m|L");
    assert_eq!(stages.len(), 32);
    assert_eq!((stages[0].as_str(), stages[1].as_str(), stages[30].as_str()), ("Ettt", "tt", "m"));
    assert_eq!(stages.concat().matches('t').count(), 61);
}

#[test]
fn megatron_gets_layout_and_sizes() {
    let arguments = arguments(&text(&uneven(), Target::Megatron));
    let stages = expand(&arguments["pipeline-model-parallel-layout"][0]);
    let blocks: Vec<usize> = stages.iter().map(|stage| stage.matches('t').count()).collect();
    assert_eq!(blocks, [7, 9, 8]);
    assert!(stages[0].starts_with('E') && stages[2].ends_with('L'));
    assert_eq!(stages.concat().matches(['E', 'L']).count(), 2);
    assert_eq!(numbers(&arguments["global-batch-size"]), [64]);
    assert_eq!(numbers(&arguments["micro-batch-size"]), [2]);
    assert!(arguments.contains_key("use-distributed-optimizer"));
}

#[test]
fn virtual_stages_come_in_the_order_of_a_forward() {
    let mut plan = plan(vec![pipeline(1, 1, 8, &[(0, 12, "A"), (12, 24, "A")])]);
    plan.blocks = 22;
    plan.pipelines[0].schedule = Schedule::Interleaved(2);
    let arguments = arguments(&text(&plan, Target::Megatron));
    let stages = expand(&arguments["pipeline-model-parallel-layout"][0]);
    assert_eq!(stages, ["Ettttt", "tttttt", "tttttt", "tttttL"]);
    let files = export(&plan, Target::Torchtitan).unwrap();
    assert_eq!(files.len(), 1);
    assert!(files[0].text.contains("Interleaved1F1B") && files[0].text.contains("[\"layers.5\", "));
    plan.pipelines[0].schedule = Schedule::Interleaved(5);
    assert!(refusal(&plan, Target::Megatron).contains("12 layers a stage"));
    for target in [Target::FlagScale, Target::SynerFuse, Target::DeepSpeed] {
        assert!(refusal(&plan, target).contains("1F1B"));
    }
}

#[test]
fn what_megatron_lacks_is_named() {
    let two = |other: ExportedPipeline| plan(vec![pipeline(1, 2, 16, &[(0, 13, "A"), (13, 26, "B")]), other]);
    let sizes = two(pipeline(1, 2, 8, &[(0, 13, "A"), (13, 26, "B")]));
    assert!(refusal(&sizes, Target::Megatron).contains("16 × 2 and 8 × 2"));
    let other_cut = two(pipeline(1, 2, 16, &[(0, 12, "A"), (12, 26, "B")]));
    assert!(refusal(&other_cut, Target::Megatron).contains("0–12 tp 4, 13–25 tp 4 and 0–11 tp 4"));
    let mut degrees = uneven();
    degrees.pipelines[0].stages[1].tensor_parallel = 2;
    assert!(refusal(&degrees, Target::Megatron).contains("tensor parallel degree"));
    let mut schedule = uneven();
    schedule.pipelines[0].schedule = Schedule::ZeroBubble;
    assert!(refusal(&schedule, Target::Megatron).contains("ZeroBubble"));
}

#[test]
fn flagscale_gets_a_mesh_a_kind() {
    let mut plan = uneven();
    plan.pipelines[0].stages[2].tensor_parallel = 8;
    let text = text(&plan, Target::FlagScale);
    let list = |key: &str| -> Vec<String> {
        let line = text.lines().find(|line| line.trim().starts_with(key)).unwrap();
        let items = line.split_once('[').unwrap().1.strip_suffix(']').unwrap();
        items.split(", ").map(|item| item.trim_matches('"').to_owned()).collect()
    };
    // [tp, cp, ep, dp, pp] each; the stages of all meshes are the layer split's.
    let meshes = numbers(&list("hetero_process_meshes"));
    assert_eq!(meshes, [4, 1, 1, 2, 2, 8, 1, 1, 2, 1]);
    let split = numbers(&list("hetero_pipeline_layer_split"));
    assert_eq!(split.len() as u32, meshes.chunks(5).map(|mesh| mesh[4]).sum::<u32>());
    assert_eq!((split.iter().sum::<u32>(), split[0]), (24, 7));
    assert_eq!(list("hetero_device_types"), ["A", "B"]);

    plan.tied_embeddings = Some(true);
    assert!(refusal(&plan, Target::FlagScale).contains("have 4 and 8"));
    let two_kinds = super::tests::plan(vec![
        pipeline(1, 1, 4, &[(0, 13, "A"), (13, 26, "B")]),
        pipeline(1, 1, 4, &[(0, 13, "B"), (13, 26, "B")]),
    ]);
    assert!(refusal(&two_kinds, Target::FlagScale).contains("stage 0 is on A and on B"));
    let mut no_block = uneven();
    no_block.pipelines[0].stages[0].layers = 0..1;
    no_block.pipelines[0].stages[1].layers = 1..17;
    assert!(refusal(&no_block, Target::FlagScale).contains("stage 0 has no decoder block"));
}

#[test]
fn divided_experts_are_said_where_there_is_a_word() {
    let mut divided = plan(vec![pipeline(2, 8, 16, &[(0, 8, "A"), (8, 17, "A"), (17, 26, "A")])]);
    for stage in &mut divided.pipelines[0].stages {
        (stage.tensor_parallel, stage.expert_parallel, stage.replicas) = (2, 8, 4);
    }
    let found = arguments(&text(&divided, Target::Megatron));
    let value = |name: &str| numbers(&found[name])[0];
    assert_eq!(value("expert-model-parallel-size"), 8);
    assert_eq!((value("expert-tensor-parallel-size"), value("tensor-model-parallel-size")), (1, 2));
    assert!(found.contains_key("sequence-parallel"));
    // Megatron's own rule: the group of the experts divides all ranks of a stage.
    assert_eq!((value("tensor-model-parallel-size") * 4 * 2) % value("expert-model-parallel-size"), 0);
    assert_eq!(value("micro-batch-size"), 2);
    for target in [Target::SynerFuse, Target::Torchtitan, Target::DeepSpeed] {
        assert!(refusal(&divided, target).contains("divided, each whole, among 8 devices"));
    }
    assert!(refusal(&divided, Target::FlagScale).contains("tensor parallel groups of 2"));
    for stage in &mut divided.pipelines[0].stages {
        (stage.tensor_parallel, stage.replicas) = (1, 8);
    }
    assert!(text(&divided, Target::FlagScale).contains("hetero_process_meshes: [1, 1, 8, 16, 3]"));
    divided.pipelines[0].stages[1].expert_parallel = 4;
    assert!(refusal(&divided, Target::Megatron).contains("one expert parallel degree"));
}

#[test]
fn synerfuse_gets_uneven_stages_and_uneven_replicas() {
    let stages = [(0, 8, "A"), (8, 17, "A"), (17, 26, "B")];
    let plan = plan(vec![pipeline(3, 4, 6, &stages), pipeline(1, 2, 10, &stages)]);
    let arguments = arguments(&text(&plan, Target::SynerFuse));
    // n₀ and so many layers, n₁ and so many layers.
    assert_eq!(numbers(&arguments["hetero-pipeline-stages"]), [2, 7, 9, 1, 8]);
    let sizes = numbers(&arguments["micro-batch-size-per-dp"]);
    let nums = numbers(&arguments["num-micro-batches-per-dp"]);
    assert_eq!((sizes.as_slice(), nums.as_slice()), (&[3, 4, 1, 2][..], &[3, 6, 1, 10][..]));
    let sum: u32 = sizes.chunks(2).zip(nums.chunks(2)).map(|(size, num)| size[0] * size[1] * num[1]).sum();
    assert_eq!(numbers(&arguments["global-batch-size"]), [sum]);
    assert!(arguments.contains_key("use-tp-pp-dp-mapping") && !arguments.contains_key("micro-batch-size"));

    let other_cut = super::tests::plan(vec![
        pipeline(1, 1, 4, &[(0, 13, "A"), (13, 26, "B")]),
        pipeline(1, 1, 4, &[(0, 26, "B")]),
    ]);
    assert!(refusal(&other_cut, Target::SynerFuse).contains("cuts all pipelines alike"));
}

/// As `torch.distributed.pipelining` reads an action: stage, computation, micro-batch.
fn action(text: &str) -> (u32, char, u32) {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap();
    let (stage, rest) = text.split_at(at);
    let kind = rest.chars().next().unwrap();
    assert!("FIWB".contains(kind), "{text}");
    (stage.parse().unwrap(), kind, rest[1..].parse().unwrap())
}

#[test]
fn torchtitan_gets_module_names_and_a_schedule_that_runs() {
    let files = export(&uneven(), Target::Torchtitan).unwrap();
    let toml: String = files[0].text.clone();
    let stages: Vec<Vec<String>> = toml
        .lines()
        .filter(|line| line.starts_with("    ["))
        .map(|line| {
            let names = line.trim().trim_matches(['[', ']', ',']);
            names.split(", ").map(|name| name.trim_matches('"').to_owned()).collect()
        })
        .collect();
    assert_eq!(stages.len(), 3);
    let mut all = vec!["tok_embeddings".to_owned()];
    all.extend((0..24).map(|block| format!("layers.{block}")));
    all.extend(["norm".to_owned(), "output".to_owned()]);
    assert_eq!(stages.concat(), all);
    assert_eq!(stages[1][0], "layers.7");
    for line in ["local_batch_size = 32", "global_batch_size = 64", "data_parallel_shard_degree = 2"] {
        assert!(toml.contains(line), "{line}");
    }

    all_is_computed(&files[1].text);
}

/// Runs a schedule of three stages and two times 16 computations.
fn all_is_computed(csv: &str) -> Vec<Vec<(u32, char, u32)>> {
    let ranks: Vec<Vec<(u32, char, u32)>> =
        csv.lines().map(|line| line.split(',').map(action).collect()).collect();
    assert_eq!(ranks.len(), 3);
    // Every micro-batch once each way; a forward waits for the stage before, a backward for the next.
    let (mut next, mut done) = ([0; 3], std::collections::BTreeSet::new());
    loop {
        let before = done.len();
        for (rank, actions) in ranks.iter().enumerate() {
            while let Some(&(stage, kind, micro_batch)) = actions.get(next[rank]) {
                assert_eq!(stage as usize, rank);
                let ready = match kind {
                    'F' => stage == 0 || done.contains(&(stage - 1, 'F', micro_batch)),
                    _ => {
                        done.contains(&(stage, 'F', micro_batch))
                            && (stage == 2 || done.contains(&(stage + 1, 'B', micro_batch)))
                    }
                };
                if !ready {
                    break;
                }
                assert!(done.insert((stage, kind, micro_batch)));
                next[rank] += 1;
            }
        }
        if done.len() == before {
            break;
        }
    }
    assert_eq!(done.len(), 3 * 2 * 16);
    ranks
}

#[test]
fn stages_that_run_ahead_are_said_by_a_schedule_or_refused() {
    let mut plan = uneven();
    plan.pipelines[0].run_ahead = 2;
    let files = export(&plan, Target::Torchtitan).unwrap();
    let ranks = all_is_computed(&files[1].text);
    let warm_up = ranks.iter().map(|of| of.iter().take_while(|(_, kind, _)| *kind == 'F').count());
    // Three forwards a later stage, and the one in turn.
    assert_eq!(warm_up.collect::<Vec<_>>(), [7, 4, 1]);
    for (_, target) in Target::ALL.into_iter().filter(|(_, target)| *target != Target::Torchtitan) {
        assert!(refusal(&plan, target).contains("run 2 further ahead"), "{target:?}");
    }
    let mut unlike = plan.pipelines[0].clone();
    unlike.run_ahead = 0;
    plan.pipelines.push(unlike);
    assert!(refusal(&plan, Target::Torchtitan).contains("one schedule for all pipelines"));
}

#[test]
fn deepspeed_gets_cuts_and_a_checkpoint_a_block() {
    let mut plan = uneven();
    plan.pipelines[0].stages[0].recompute = true;
    let files = export(&plan, Target::DeepSpeed).unwrap();
    let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let (config, partition) = (parse(&files[0].text), parse(&files[1].text));
    let number = |key: &str| config[key].as_u64().unwrap();
    // DeepSpeed's own rule: batch = micro-batch × accumulation × replicas.
    let replicas = partition["data_parallel_size"].as_u64().unwrap();
    assert_eq!(
        number("train_batch_size"),
        number("train_micro_batch_size_per_gpu") * number("gradient_accumulation_steps") * replicas
    );
    // Embedding, 24 blocks and head, cut as `PipelineModule.parts` has it.
    assert_eq!(partition["parts"], serde_json::json!([0, 8, 17, 26]));
    assert_eq!(partition["tied_embeddings"], false);
    let stages = partition["stages"].as_array().unwrap();
    assert_eq!(stages.len() as u64, partition["num_stages"].as_u64().unwrap());
    let mut next = 0;
    for stage in stages {
        assert_eq!(stage["first_block"].as_u64().unwrap(), next);
        next += stage["num_blocks"].as_u64().unwrap();
    }
    assert_eq!(next, 24);
    let intervals = stages.iter().map(|stage| stage["activation_checkpoint_interval"].as_u64().unwrap());
    assert_eq!(intervals.collect::<Vec<_>>(), [1, 0, 0]);
    let mut replicated = uneven();
    replicated.pipelines[0].stages[1].replicas = 2;
    assert!(refusal(&replicated, Target::DeepSpeed).contains("number of replicas"));
}

#[test]
fn a_micro_batch_is_shared_among_replicas_or_refused() {
    let mut plan = uneven();
    for stage in &mut plan.pipelines[0].stages {
        stage.replicas = 2;
    }
    assert_eq!(numbers(&arguments(&text(&plan, Target::Megatron))["micro-batch-size"]), [1]);
    plan.pipelines[0].micro_batch = 3;
    for (_, target) in Target::ALL {
        assert!(refusal(&plan, target).contains("cannot be divided"), "{target:?}");
    }
}

#[test]
fn no_pipeline_is_no_plan() {
    for (name, target) in Target::ALL {
        assert!(refusal(&plan(vec![]), target).starts_with(name));
        assert!(refusal(&plan(vec![pipeline(1, 1, 1, &[])]), target).contains("without stages"));
    }
}
