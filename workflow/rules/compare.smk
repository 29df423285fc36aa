rule compare:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        reference="<run>/reference/{system}/manifest.json",
        samples=expand(
            "<run>/sample/{{system}}/{method}/seed{seed}/manifest.json",
            method=RUN.config.sample.methods,
            seed=range(RUN.config.sample.seeds),
        ),
        free_energy=(
            ["<run>/free_energy/{system}/manifest.json"]
            if RUN.config.free_energy.enabled
            else []
        ),
    output:
        folder=report(
            directory("<run>/compare/{system}"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            subcategory="{system}",
            labels={"figure": "{figure}"},
        ),
    log:
        "<run>/logs/compare/{system}.log",
    benchmark:
        "<run>/benchmarks/compare/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 8
    resources:
        mem_mb=6000,
        runtime=60,
    params:
        config=str(RUN.frozen),
        key=job_key("compare"),
        prepared=subpath(input.prepared, parent=True),
        reference=subpath(input.reference, parent=True),
        samples=folders_of("samples"),
        free_energy=flag_of("--free-energy", "free_energy"),
    message:
        "compare: free energies, kinetics and speed of {wildcards.system}"
    shell:
        "exec longstride compare --config {params.config:q} --system {wildcards.system}"
        " --prepared {params.prepared:q} --reference {params.reference:q} --samples {params.samples:q}"
        " {params.free_energy:q} --out {output.folder:q} --threads {threads} > {log:q} 2>&1"


rule summary:
    input:
        comparisons=expand("<run>/compare/{system}", system=RUN.compared),
        dynamics=expand("<run>/dynamics/{system}", system=RUN.paired),
        aside=RUN.samples_aside,
    output:
        table=report(
            "<run>/summary.csv",
            caption="../report/summary.rst",
            category="Comparison",
            labels={"result": "all methods, one row per system, method and seed"},
        ),
    log:
        "<run>/logs/summary.log",
    benchmark:
        "<run>/benchmarks/summary.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=5,
    params:
        config=str(RUN.frozen),
        key=job_key("summary"),
    message:
        "summary: one table of all systems and methods"
    shell:
        "exec longstride summary --config {params.config:q} --compare {input.comparisons:q}"
        " --dynamics {input.dynamics:q} --out {output.table:q} > {log:q} 2>&1"
