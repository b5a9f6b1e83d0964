//! What does not depend on the machine's mood: instructions, system calls, allocations, flushes, bytes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use bench_work::probes::MARK;
use bench_work::protocol::{Extra, Opening, Work};

use crate::contender::{Contender, Process, programs};

/// System calls between the marks of a round.
#[derive(Clone, Debug, Default)]
pub struct Calls {
    pub by_name: BTreeMap<String, u64>,
    /// What the writing calls returned, in bytes.
    pub written: u64,
}

impl Calls {
    pub fn total(&self) -> u64 {
        self.by_name.values().sum()
    }

    pub fn flushes(&self) -> u64 {
        ["fsync", "fdatasync"].iter().filter_map(|name| self.by_name.get(*name)).sum()
    }
}

/// Does `work` once under strace. Calls of all threads count, those of the recycler, too.
pub fn calls(contender: Contender, opening: &Opening, work: &Work, trace: &Path) -> Result<Calls> {
    let mut process = Process::open_in(contender, traced(contender, trace)?, opening)?;
    process.run(work)?;
    process.close()?;
    read(trace)
}

/// The same of one compaction.
pub fn calls_of_compaction(opening: &Opening, trace: &Path) -> Result<Calls> {
    let mut process = Process::open_in(Contender::Library, traced(Contender::Library, trace)?, opening)?;
    process.extra(Extra::Compact(None))?;
    process.close()?;
    read(trace)
}

fn traced(contender: Contender, trace: &Path) -> Result<Command> {
    let plain = contender.command()?;
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(trace).arg(plain.get_program()).args(plain.get_args());
    Ok(command)
}

fn read(trace: &Path) -> Result<Calls> {
    let text = fs::read_to_string(trace)?;
    fs::remove_file(trace)?;
    Ok(parse(&text))
}

fn parse(trace: &str) -> Calls {
    let mark = format!("getpgid({MARK})");
    let mut calls = Calls::default();
    let mut inside = false;
    for line in trace.lines() {
        // "1234  pwrite64(3, ..., 4096, 8192) = 4096", or in two halves if another thread's came in between.
        let Some((_, call)) = line.trim_start().split_once(' ') else { continue };
        let call = call.trim_start();
        if call.starts_with(&mark) {
            inside = !inside;
            continue;
        }
        if !inside {
            continue;
        }
        let resumed = call.strip_prefix("<... ");
        let name = call.strip_prefix("<... ").unwrap_or(call).split(['(', ' ']).next().unwrap_or_default();
        if resumed.is_none() && call.contains('(') {
            *calls.by_name.entry(name.to_owned()).or_default() += 1;
        }
        if matches!(name, "write" | "pwrite64" | "pwritev" | "pwritev2" | "copy_file_range") {
            let result = call.rsplit_once(" = ").map(|(_, result)| result.trim());
            calls.written += result.and_then(|result| result.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    calls
}

/// Heap allocations of one operation.
pub fn allocations(contender: Contender, opening: &Opening, work: &Work) -> Result<f64> {
    let mut command = contender.command()?;
    command.env("LD_PRELOAD", programs()?.join("liballocations.so"));
    let mut process = Process::open_in(contender, command, opening)?;
    let done = process.run(work)?;
    process.close()?;
    let counted = done.allocations.context("liballocations.so is not beside the programs")?;
    Ok(counted as f64 / done.operations.max(1) as f64)
}

/// User-space instructions of one operation: callgrind's count of a process that goes through a round twice less that of one that
/// does so once. So neither starting counts, nor what is done once for each table: the row is about tables that are in memory.
pub fn instructions(contender: Contender, opening: &Opening, work: &Work, folder: &Path) -> Result<f64> {
    let count = |rounds: u32| -> Result<f64> {
        let plain = contender.command()?;
        let output = folder.with_extension("callgrind");
        let mut command = Command::new("valgrind");
        command.args(["-q", "--tool=callgrind"]).arg(format!("--callgrind-out-file={}", output.display()));
        command.arg(plain.get_program()).args(plain.get_args()).stderr(std::process::Stdio::null());
        let mut process = Process::open_in(contender, command, opening)?;
        for _ in 0..rounds {
            process.run(work)?;
        }
        process.close()?;
        let text = fs::read_to_string(&output)?;
        fs::remove_file(&output)?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: ")));
        total.and_then(|total| total.trim().parse().ok()).context("callgrind's output has no summary")
    };
    Ok((count(2)? - count(1)?) / (work.count + work.warm) as f64)
}
