rule dynamics:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        mts=expand(
            "<run>/sample/{{system}}/mts/seed{seed}/manifest.json",
            seed=range(RUN.config.sample.seeds),
        ),
        sts=expand(
            "<run>/sample/{{system}}/sts/seed{seed}/manifest.json",
            seed=range(RUN.config.sample.seeds),
        ),
    output:
        folder=report(
            directory("<run>/dynamics/{system}"),
            patterns=["{figure}.svg"],
            caption="../report/dynamics.rst",
            category="Dynamics",
            subcategory="{system}",
            labels={"figure": "{figure}"},
        ),
    log:
        "<run>/logs/dynamics/{system}.log",
    benchmark:
        "<run>/benchmarks/dynamics/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 8 if RUN.config.dynamics.configurational_frames else 1
    resources:
        mem_mb=6000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("dynamics"),
        prepared=subpath(input.prepared, parent=True),
        mts=folders_of("mts"),
        sts=folders_of("sts"),
        state=RUN.state("dynamics", "{system}"),
    message:
        "dynamics: multi-time-step against single-step dynamics of {wildcards.system}"
    shell:
        "exec longstride dynamics --config {params.config:q} --system {wildcards.system}"
        " --prepared {params.prepared:q} --mts {params.mts:q} --sts {params.sts:q}"
        " --out {output.folder:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"
