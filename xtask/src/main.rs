//! `cargo xtask`: everything that a developer or CI does with this repository.

mod apt;
mod command;

mod ebpf;
mod build;
mod checkout;
mod counts;
mod fuzz;
mod image;
mod musl;
mod rungs;
mod sdks;
mod manifests;
mod setup;
mod tools;
mod kernels;
mod house;
mod steps;
mod ci;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use self::{
    image::{Directories, Product},
    kernels::Rows,
};

/// Builds, tests and shows kube2ram.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measures what kube2ram costs next to what it is compared with, all in one run
    Bench {
        /// The cloud that the machine stands for
        #[arg(long, value_parser = ["alibaba", "aws"], default_value = "alibaba")]
        cloud: String,
        /// authenticator, connect, kernel, scale, service or wire; all of them when none is named
        subjects: Vec<String>,
    },
    /// Builds the eBPF programs and the agent: target/debug/kube2ram
    Build {
        /// Optimised, and one static file: target/dist/{amd64,arm64}/kube2ram
        #[arg(long)]
        release: bool,
    },
    /// Builds the eBPF programs alone, reproducibly: target/ebpf/*.o
    BuildEbpf,
    /// Runs what CI runs, and prints a table of what each step took
    Ci {
        /// What runs once a night: an hour of fuzzing, the image twice, a real API server, all tests on all
        /// kernels
        #[arg(long)]
        nightly: bool,
    },
    /// Writes those parts of the documents that come from the code: the tables of flags and annotations
    Docs,
    /// Lets libFuzzer look for input that the agent's parsers, and the metadata service as a whole, take in a
    /// wrong way
    Fuzz(fuzz::Fuzz),
    /// Builds static binaries for x86-64 and arm64 and an OCI image of both, the same bytes anywhere:
    /// target/dist. Of the agent, or with --product of the authenticator
    Image(image::Request),
    /// Checks formatting, lints and docs
    Lint,
    /// Writes deploy/kustomize/base and deploy/kube2ram.yaml, which are made of deploy/helm/kube2ram
    Manifests,
    /// Shows the main job on this machine: pods, each with its own role
    Sandbox {
        /// Instead shows the authenticator's: users and roles that log in to a real API server (builds
        /// kube-apiserver, etcd and kubectl once)
        #[arg(long, conflicts_with_all = ["cloud", "credentials_from", "keep"])]
        authenticator: bool,
        /// The cloud that the machine stands for
        #[arg(long, value_parser = ["alibaba", "aws"], default_value = "alibaba")]
        cloud: String,
        /// By whose right pods' roles are assumed: the node's, or that of pods' ServiceAccounts
        #[arg(long, value_parser = sdks::CREDENTIALS_FROM, default_value = "node")]
        credentials_from: String,
        /// Leaves everything running until Ctrl-C, to be played with
        #[arg(long)]
        keep: bool,
    },
    /// Installs what building and testing need (Debian packages, bpf-linker, the Rust sources)
    Setup,
    /// Runs unit and component tests, and as root those on the real kernel
    Test {
        /// Instead builds the images, has other tools read them, and runs what they hold
        #[arg(long, conflicts_with_all = ["kernels", "reboot", "sdks"])]
        image: bool,
        /// Instead runs tests of the eBPF programs on Linux 5.10, 6.1 and 6.12, or on those named, in virtual
        /// machines (downloads the kernels once)
        #[arg(long, value_name = "SERIES", num_args = 0.., require_equals = true, value_delimiter = ',', value_parser = kernels::SERIES)]
        kernels: Option<Vec<String>>,
        /// Instead reboots a node with systemd in a virtual machine, where pods start before the agent
        /// (downloads Debian packages once)
        #[arg(long, conflicts_with_all = ["kernels", "sdks"])]
        reboot: bool,
        /// Instead applies the manifests to a real API server, runs the agent against it, and logs in to it
        /// by the authenticator (builds kube-apiserver, etcd and kubectl once)
        #[arg(long, conflicts_with_all = ["kernels", "reboot", "sdks"])]
        api_server: bool,
        /// Counts a test that cannot run here as failed
        #[arg(long, env = "CI", num_args = 0..=1, default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
        no_skip: Option<bool>,
        /// Runs unmodified SDKs in pods instead, and installs them under target/sdks
        #[arg(long, conflicts_with = "kernels")]
        sdks: bool,
        /// With --sdks: with roles from there alone. Both by default
        #[arg(long, requires = "sdks", value_parser = sdks::CREDENTIALS_FROM)]
        credentials_from: Option<String>,
        /// With --image: for both architectures, and once more in another directory, compared. With
        /// --kernels: all tests that run there
        #[arg(long)]
        thorough: bool,
    },
}

#[expect(clippy::print_stderr, reason = "for the person at the terminal")]
fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Bench { cloud, subjects } => steps::bench(&cloud, &subjects),
        Task::Build { release: true } => build::release(Product::Agent).map(drop),
        Task::Build { release: false } => {
            build::programs().map(|programs| command::say(format!("built {}", programs.agent.display())))
        }
        Task::BuildEbpf => ebpf::build().map(drop),
        Task::Ci { nightly } => ci::run(nightly),
        Task::Docs => steps::docs(),
        Task::Fuzz(fuzz) => fuzz.run().map(drop),
        Task::Image(image) => image.run(),
        Task::Lint => steps::lint(),
        Task::Manifests => manifests::write(),
        Task::Sandbox { authenticator: true, .. } => steps::logins(),
        Task::Sandbox { cloud, credentials_from, keep, .. } => {
            steps::sandbox(&cloud, &credentials_from, keep)
        }
        Task::Setup => setup::everything(),
        Task::Test { image, kernels, reboot, api_server, sdks, credentials_from, thorough, no_skip } => {
            ensure!(!thorough || image || kernels.is_some(), "--thorough is for --image and --kernels");
            let no_skip = no_skip.unwrap_or(false);
            let rows = if thorough { Rows::All } else { Rows::Essential };
            let counts = match kernels {
                Some(series) => kernels::test(rows, &series, no_skip),
                None if image => {
                    image::prove(if thorough { Directories::Two } else { Directories::One }, no_skip)
                }
                None if reboot => kernels::reboot(),
                None if api_server => rungs::test_on_api_server(),
                None if sdks => sdks::test(credentials_from.as_deref(), no_skip),
                None => rungs::test(no_skip),
            }?;
            command::say(counts.to_string());
            Ok(())
        }
    }
}
